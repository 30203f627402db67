"""The mesh of devices, the rules that split arrays over it, and loading straight onto it."""
