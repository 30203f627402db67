"""Runs in processes of their own, for tests that kill them.

Each line of standard input, `{"call": name, ...arguments}`, is answered by the number of a process that was forked for
it and, once that has ended, by its exit status (as `subprocess` has it). What is slow to import is imported once,
before forking; JAX starts no device, and so no thread, before that.
"""

import functools
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sled.train.run.checkpoint import Checkpoints, load_checkpoint
from sled.train.run.metrics import Metrics
from sled.train.run.named_arrays import named
from sled.train.run.preemption import Preemption, leave

WIDTH = 256  # some 1.6 MB of state: a checkpoint takes long enough to be killed in
OPTIMIZER = optax.adam(1e-2)


def train(folder: str, steps: int, cache: str, pause_at: int = 0) -> None:
    """Two matrices, Adam, noise from split keys, and a data position whose stride is a curriculum of its own.

    pause_at: a step at which to wait for a signal. cache: a folder for compiled programs.
    """
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    folder = Path(folder)
    begun, state, host = 0, jax.jit(begin)(), {"position": 0, "stride": 1}
    with Preemption() as preemption, Checkpoints(folder / "steps", {"width": WIDTH}, save_every=1) as checkpoints:
        if checkpoints.steps:
            begun, state, host, *_ = checkpoints.restore(state)
        with Metrics(folder / "metrics.jsonl", resumed_from=begun) as metrics:
            for step in range(begun + 1, steps + 1):
                state, loss = update(state, (np.arange(8 * WIDTH, dtype=np.float32) * 31 + host["position"]) % 97)
                host = {"position": host["position"] + host["stride"], "stride": 1 + step % 3}
                metrics.write(step, {"loss": loss})
                if step == pause_at:
                    signal.pause()
                stop = preemption.reached(step)
                checkpoints.save(step, state, host, force=stop or step == steps)
                if stop:
                    checkpoints.wait()
                    leave(step, folder)
    np.savez(folder / "final.npz", position=host["position"], **{
        name.replace("/", " "): np.asarray(array) for name, array in named(state).items()})


def begin():
    weights = {"up": jnp.full((WIDTH, WIDTH), 0.01), "down": jnp.eye(WIDTH)}
    return {"weights": weights, "optimizer": OPTIMIZER.init(weights), "key": jax.random.key(7)}


def loss_of(weights, x_BD, noise_BD):
    return jnp.mean((jnp.tanh((x_BD + noise_BD) @ weights["up"]) @ weights["down"] - x_BD) ** 2)


@functools.partial(jax.jit, donate_argnums=0)  # a checkpoint must have its copy before the next step
def update(state, data):
    x_BD = data.reshape(8, WIDTH) / 97
    key, used = jax.random.split(state["key"])
    noise_BD = 0.1 * jax.random.normal(used, x_BD.shape)
    loss, gradient = jax.value_and_grad(loss_of)(state["weights"], x_BD, noise_BD)
    change, optimizer = OPTIMIZER.update(gradient, state["optimizer"])
    return {"weights": optax.apply_updates(state["weights"], change), "optimizer": optimizer, "key": key}, loss


def meshes(folder: str) -> None:
    """A state saved on one mesh comes back on others, and on a single device, bit for bit."""
    jax.config.update("jax_num_cpu_devices", 8)
    state = {"weights": jnp.arange(96.0).reshape(8, 12), "bias": jnp.arange(8, dtype=jnp.bfloat16),
             "key": jax.random.split(jax.random.key(1), 4), "step": jnp.int32(3)}
    specs = {"weights": PartitionSpec("fsdp", "tensor"), "bias": PartitionSpec("fsdp"), "key": PartitionSpec()}

    def spread(mesh, specs):
        return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}

    def mesh(*shape):
        return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

    with Checkpoints(folder, {}, save_every=1) as checkpoints:
        here = spread(mesh(4, 2), specs)
        checkpoints.save(1, {**jax.device_put({name: state[name] for name in specs}, here), "step": state["step"]}, {})

    turned = {"weights": PartitionSpec("tensor", "fsdp"), "bias": PartitionSpec(), "key": PartitionSpec("tensor")}
    for place in (spread(mesh(2, 4), turned), spread(mesh(8, 1), specs), spread(mesh(4, 2), specs)):
        like = {name: jax.ShapeDtypeStruct(state[name].shape, state[name].dtype, sharding=place.get(name))
                for name in state}
        restored = load_checkpoint(folder, like).state
        for name, sharding in place.items():
            assert restored[name].sharding.is_equivalent_to(sharding, restored[name].ndim), (name, restored[name])
        assert len(restored["step"].sharding.device_set) == 8  # it was never placed: whole on each device
        jax.jit(lambda state: state)(restored)
        same(restored, state)
    same(load_checkpoint(folder, jax.eval_shape(lambda: state)).state, state)


def same(one, other) -> None:
    one, other = named(one), named(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]), err_msg=name)


def serve(calls) -> None:
    for line in sys.stdin:
        arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                calls[arguments.pop("call")](**arguments)
                code = 0
            except SystemExit as end:
                code = end.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(globals())
