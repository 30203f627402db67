"""Run twice by test_train_mesh.py: python mesh_of_two_processes.py ADDRESS INDEX FOLDER OUT. One mesh over both."""

import json
import sys
from pathlib import Path

import jax
from mesh_training import CountedFile, train

import sled.models.stored
from sled.models import save_folder
from sled.models.sharding.load_sharded import load_onto
from sled.models.sharding.mesh import Mesh
from sled.models.sharding.sharding import Sharding
from sled.train.parallel.distributed import Processes, initialize

address, index, folder, out = sys.argv[1:]
said = initialize(Processes(coordinator=address, count=2, index=int(index)))
mesh = Mesh().build()
sled.models.stored.safe_open = CountedFile
decoder = load_onto(folder, mesh)
save_folder(decoder, Path(out) / "model")
sharding = Sharding(decoder.config, mesh)
losses, _, _ = train(decoder, 3, sharding)
rows = sharding.local_rows(8)
notes = {"said": said, "devices": jax.device_count(), "rows": [rows.start, rows.stop], "losses": losses,
         "asked": sum(count for _, count in CountedFile.asked), "saved": (Path(out) / "model" / "config.json").exists()}
(Path(out) / f"process{index}.json").write_text(json.dumps(notes))
jax.distributed.shutdown()
