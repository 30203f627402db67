"""One training run over several processes: who they are, and how they find each other."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather, sync_global_devices

from sled.errors import SettingError, SledError
from sled.settings.decorator import setting, settings
from sled.settings.rules import OneOf, OrNone, Whole

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
CLUSTERS = ("tpu", "slurm")
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost


@settings
class Processes:
    """The processes of a run. By default what the environment says: a SLURM step, a TPU pod, or one process alone.

    A TPU VM that does not name its pod's hosts in the environment needs the cluster "tpu", which asks Google's metadata
    server. Machines without a cluster manager need coordinator, count and index, which belong together.
    """

    cluster: str | None = setting(OrNone(OneOf(CLUSTERS), "what the environment says"), default=None,
                                  help="join the processes of a TPU pod slice or a SLURM step")
    coordinator: str | None = setting(default=None, help="without a cluster manager: host:port of process 0")
    count: int | None = setting(OrNone(Whole(1, hint="it counts the processes of the run"), "as the environment says"),
                                default=None, option="processes",
                                help="without a cluster manager: how many processes there are")
    index: int | None = setting(OrNone(Whole(0, hint="each process has its own, from 0"), "as the environment says"),
                                default=None, option="process", help="without a cluster manager: which of them this is")

    def __post_init__(self):
        given = {name: getattr(self, name) is not None for name in ("coordinator", "count", "index")}
        if not any(given.values()):
            return
        if missing := [name for name, there in given.items() if not there]:
            named = " and ".join(f"Processes.{name}" for name in missing)
            raise SettingError(f"{named} {'are' if missing[1:] else 'is'} missing: Processes.coordinator (host:port of "
                               "process 0), Processes.count and Processes.index (from 0) belong together; give all "
                               "three, or none under a cluster manager")
        if self.cluster:
            raise SettingError(f"Processes.cluster is {self.cluster!r}, which finds the coordinator by itself, but "
                               f"coordinator is {self.coordinator!r}; give one of the two")
        host, _, port = str(self.coordinator).rpartition(":")
        if not host or not port.isdigit():
            raise SettingError(f"Processes.coordinator is {self.coordinator!r}, but must be host:port, such as "
                               "'10.0.0.1:8476', the same on all processes")
        Whole(0, self.count - 1, hint="each process has its own, from 0")("Processes.index", self.index)


def initialize(processes: Processes | None = None) -> str:
    """Joins the run's processes, before anything else is asked of jax; returns in words how they found each other.

    After it, `jax.devices()` are those of all processes. A single process is left as it is.
    Raises SettingError where the environment lacks what the cluster needs, or jax has already started its devices.
    """
    processes = processes or Processes()
    if processes.coordinator:
        _join(coordinator_address=processes.coordinator, num_processes=processes.count, process_id=processes.index,
              cluster_detection_method="deactivate")
        return f"process {processes.index} of {processes.count}, coordinator {processes.coordinator}"
    cluster = processes.cluster or _cluster(os.environ)
    if cluster is None:
        return "one process"
    if cluster == "slurm" and (missing := [name for name in SLURM if name not in os.environ]):
        raise SettingError(f"the environment lacks {', '.join(missing)}, which SLURM gives to every task of a step; "
                           "start the command with srun (scripts/launch_slurm.sh does)")
    try:
        _join(cluster_detection_method="slurm" if cluster == "slurm" else None)
    except ValueError as reason:
        raise SettingError(f"no {cluster} cluster was found ({reason}); start the command on every host of it, or "
                           "give coordinator, count and index") from reason
    return f"process {jax.process_index()} of {jax.process_count()}, {cluster}"


def synchronise(point: str) -> None:
    """Returns in every process once all of them have reached this `point` of the program."""
    if jax.process_count() > 1:
        sync_global_devices(f"sled: {point}")


def from_first_process(text: str | None) -> str | None:
    """The text that the first process gives, in all of them; they call it together."""
    if jax.process_count() == 1:
        return text
    encoded = np.frombuffer((text or "").encode(), np.uint8)
    length = int(broadcast_one_to_all(np.int32(-1 if text is None else len(encoded))))
    if length < 1:
        return None if length < 0 else ""
    room = 2 ** length.bit_length()  # other lengths up to it take the same program
    return bytes(broadcast_one_to_all(np.resize(encoded, room)))[:length].decode()


def checked_by_first(check: Callable, *args) -> None:
    """`check(*args)` in the first process alone. The SledError that it raises there is raised in it, and in all others
    a SettingError with the same words. For what several would be in each other's way with, such as trying a folder;
    all call it together."""
    error = None
    if jax.process_index() == 0:
        try:
            check(*args)
        except SledError as reason:
            error = reason
    said = from_first_process(None if error is None else str(error))
    if error is not None:
        raise error
    if said is not None:
        raise SettingError(said)


def check_same_everywhere(values: Mapping[str, Any]) -> None:
    """Raises SettingError, in all processes, where one was given other settings than the first: each would compute a
    part of something else.

    values: of the settings, as JSON has them, with the same keys everywhere. Names beside digests
        (`sled.train.run.resume`) may differ, as machines have paths of their own.
    """
    if jax.process_count() == 1:
        return
    digests_KD = np.stack([_digest(value) for value in values.values()])
    differs_PK = (process_allgather(digests_KD) != digests_KD).any(-1)
    for name, differs_P in zip(values, differs_PK.T, strict=True):
        if differs_P.any():
            raise SettingError(f"{name} is not the same in process {jax.process_index()} and in process "
                               f"{differs_P.argmax()}; start all of them with the same options and the same data")


def _digest(value) -> np.ndarray:
    if isinstance(value, Mapping) and "digest" in value:
        value = value["digest"]
    return np.frombuffer(hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest(), np.uint8)


def _cluster(environment) -> str | None:
    """The cluster whose variables announce more than one process."""
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return "slurm"
    if any("," in environment.get(name, "") for name in TPU_HOSTS):
        return "tpu"
    return None


def _join(**settings) -> None:
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=HEARTBEAT)
    except RuntimeError as reason:
        if "must be called before" not in str(reason) and "only be called once" not in str(reason):
            raise
        raise SettingError("the processes of the run cannot be joined any more, because jax has already started its "
                           "devices; call initialize before anything else that uses jax") from reason
