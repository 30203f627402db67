"""Leaving early: how sure is sure enough, what is done about it, and when deeper layers run."""

from sled.exits.early import EarlyExit
from sled.exits.full import FullDepth
from sled.exits.measures import Classifier
from sled.exits.policy import Policy
from sled.exits.schedule import Gather, Immediate, Lockstep, Schedule
from sled.exits.speculation import SelfSpeculation

__all__ = ["Classifier", "EarlyExit", "FullDepth", "Gather", "Immediate", "Lockstep", "Policy", "Schedule",
           "SelfSpeculation"]
