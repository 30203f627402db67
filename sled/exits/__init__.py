"""Leaving early: how sure is sure enough, what is done about it, and when deeper layers run.

`POLICIES` and `SCHEDULES` register what the library has, by the command's words: `sled` and the command take it from
there.
"""

from sled.exits.confidence import Classifier
from sled.exits.early_exit import EarlyExit
from sled.exits.full_depth import FullDepth
from sled.exits.policy import Decision, ExitView, Policy
from sled.exits.schedule import Gather, Immediate, Lockstep, Schedule
from sled.exits.speculation import SelfSpeculation

POLICIES = {"none": FullDepth, "early": EarlyExit, "speculate": SelfSpeculation}
SCHEDULES = {"immediate": Immediate, "lockstep": Lockstep, "gather": Gather}

__all__ = ["POLICIES", "SCHEDULES", "Classifier", "Decision", "EarlyExit", "ExitView", "FullDepth", "Gather",
           "Immediate", "Lockstep", "Policy", "Schedule", "SelfSpeculation"]
