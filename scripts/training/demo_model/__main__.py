"""Train the bundled demo model from nothing: scenes, tower, language model, checkpoint.

    python -m scripts.training.demo_model all --folder /tmp/demo_train
    python -m scripts.training.demo_model tower --folder /tmp/demo_train     # resumes
    python -m scripts.training.demo_model all --smoke --folder /tmp/smoke    # a few steps of each
    python -m scripts.training.demo_model all --seed 1000 --vision-layers 6 --folder /tmp/second

Needs two CPU cores and about 6 GB of memory; each training stage runs as two single-thread
processes (two threads in one process are much slower on these small matrices). A stage that was
stopped resumes from its last checkpoint; delete FOLDER/<stage>.pt to start it again.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

STAGES = ("data", "tower", "language", "joint", "export")
MINUTES = {"tower": 25.0, "language": 45.0, "joint": 25.0}
# (rate of the layers' matrices, rate of everything else)
RATES = {"tower": (4e-3, 2e-3), "language": (4e-3, 2e-3), "joint": (2e-3, 1e-3)}
BATCH = {"tower": 32, "language": 16, "joint": 16}
QUESTIONS_PER_IMAGE = 14
SMOKE_SIZES = {"vision_layers": 2, "vision_width": 32, "text_layers": 2, "text_width": 32}
LOG = logging.getLogger("demo_model")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=__package__, description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--folder", type=Path, required=True, help="data, logs and checkpoints")
    parser.add_argument("--minutes", type=float, help="processor time of the stage")
    parser.add_argument("--ranks", type=int, default=2, help="processes that train together")
    parser.add_argument("--port", type=int, default=29_611, help="where they meet")
    parser.add_argument("--target", type=Path, help="where export writes; FOLDER/checkpoint")
    parser.add_argument("--weights", choices=("language", "joint"), default="joint")
    parser.add_argument("--notes", default="", help="a sentence about the run, for the card")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--vision-layers", type=int, default=8, help="layers of the tower")
    parser.add_argument("--vision-width", type=int, default=128, help="channels of the tower")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few steps, under 60 s")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def launch(stage: str, options: argparse.Namespace) -> None:
    """Run a training stage as several processes and wait for them."""
    command = [sys.executable, "-m", __package__, stage, "--worker"]
    command += ["--folder", str(options.folder)]
    if options.minutes is not None:
        command += ["--minutes", str(options.minutes)]
    for name in ("seed", "vision_layers", "vision_width"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    if options.smoke:
        command.append("--smoke")
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(options.port),
        "WORLD_SIZE": str(options.ranks),
        # Keep freed memory: returning it to the system after every step costs a tenth.
        "MALLOC_MMAP_THRESHOLD_": "2000000000",
        "MALLOC_TRIM_THRESHOLD_": "8000000000",
        "MALLOC_TOP_PAD_": "100000000",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    workers = [
        subprocess.Popen(command, env={**common, "RANK": str(rank)})
        for rank in range(options.ranks)
    ]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit(f"stage {stage} failed: exit codes {codes}")


def model_sizes(options: argparse.Namespace) -> dict[str, int]:
    """The architecture that was asked for, as arguments of `build_model`."""
    if options.smoke:
        return SMOKE_SIZES
    return {"vision_layers": options.vision_layers, "vision_width": options.vision_width}


def work(stage: str, options: argparse.Namespace) -> None:
    """One rank's part of a training stage."""
    from .language import train_language
    from .tower import train_tower

    minutes = options.minutes or (0.05 if options.smoke else MINUTES[stage])
    sizes = model_sizes(options)
    batch = 4 if options.smoke else BATCH[stage]
    if stage == "tower":
        train_tower(options.folder, minutes, batch, sizes, RATES[stage], options.seed)
        return
    layer = 1 if options.smoke else 3
    train_language(
        options.folder,
        stage,
        minutes,
        batch,
        QUESTIONS_PER_IMAGE,
        sizes,
        RATES[stage],
        layer,
        options.seed,
    )


def run_stage(stage: str, options: argparse.Namespace) -> None:
    begin = time.time()
    if stage == "data":
        from .data import build

        report = build(options.folder / "data", *((64, 12) if options.smoke else (60_000, 400)))
        LOG.info("data %s", report)
    elif stage == "export":
        from .card import export_with_card

        sizes, limit = model_sizes(options), 12 if options.smoke else None
        target = options.target or options.folder / "checkpoint"
        export_with_card(options.folder, target, sizes, options.weights, limit, options.notes)
    else:
        launch(stage, options)
    LOG.info("stage %s took %.1f minutes", stage, (time.time() - begin) / 60)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.worker:
        work(options.stage, options)
        return
    for stage in STAGES if options.stage == "all" else (options.stage,):
        run_stage(stage, options)


if __name__ == "__main__":
    main()
