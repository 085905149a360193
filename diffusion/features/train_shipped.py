"""Train the extractor that comes with the package, on EuroSAT: about 20 minutes on two CPU cores.

python -m diffusion.features.train_shipped --archive EuroSAT.zip
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train_extractor.py

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from diffusion.data.ingest import ingest
from diffusion.data.loader import ShardImages
from diffusion.data.sources.eurosat import read_eurosat
from diffusion.features.extractor import eurosat_input
from diffusion.features.identity import SHIPPED_WEIGHTS
from diffusion.features.learning import Labelled, accuracy, as_stored, fit, tell_classes
from diffusion.store.objects import FolderStore

EPOCHS = 14
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="the EuroSAT zip or folder")
    parser.add_argument("--output", type=Path, default=SHIPPED_WEIGHTS, help="where the weights go")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()

    data: dict[str, Labelled] = {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = ingest(read_eurosat(arguments.archive), FolderStore(Path(folder)))
        for split in ("train", "test"):
            shards = ShardImages(
                FolderStore(Path(folder)), dataset, split, dataset.images.size, Path(folder), memory_bytes=0
            )
            pixels, labels = (np.concatenate(parts) for parts in zip(*shards.all(), strict=True))
            data[split] = Labelled(pixels, torch.from_numpy(labels), partial(eurosat_input, device=CPU))
    began = time.monotonic()

    def report(epoch: int, loss: float) -> None:
        print(f"epoch {epoch}/{arguments.epochs}  loss {loss:.4f}  {time.monotonic() - began:.0f} s", flush=True)

    classes = dataset.images.classes
    network = fit(data["train"], len(classes), arguments.epochs, CPU, tell_classes, report)
    result = {
        "classes": list(classes),
        "dataset": dataset.digest,
        "accuracy": round(accuracy(network, data["test"]), 4),
        "accuracy_at_32": round(accuracy(network, data["test"], partial(F.avg_pool2d, kernel_size=2)), 4),
        "epochs": arguments.epochs,
    }
    save_file(as_stored(network), arguments.output, metadata={"report": json.dumps(result)})
    print(json.dumps(result, indent=1), f"\n{arguments.output}: {arguments.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
