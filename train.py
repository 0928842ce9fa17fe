"""Trains an experiment: `python train.py experiment=kairos_tiny`. `--help` lists what can be changed."""

import os
import sys

HELP = """Trains one experiment, phase after phase, into a run folder that is also the checkpoint.

usage: python train.py experiment=NAME [KEY=VALUE ...]

  experiment=NAME          a file of configs/experiment: kairos_tiny (laptop CPU, minutes), kairos_small (one GPU),
                           kairos_base (the published shape, a cluster); on top of a finished kairos_tiny:
                           kairos_tiny_scene (what moves and what stands), kairos_tiny_edit (edits of recorded clips),
                           kairos_tiny_distilled (a student that needs fewer sampling steps); from any finished run
                           to new data: finetune_full, finetune_lora, finetune_frozen, finetune_images;
                           kairos_small_demo and kairos_tiny_images train on the demo's data
  data.root=DIR            shards to train on (made by `python -m worldmodel.data generate ...`)
  run_dir=DIR              where the run goes; the same folder again resumes it, or does nothing when it is done
  init=FILE                weights to start from: a run folder, or what `python -m worldmodel.convert` wrote
  data.episodes=N          so many training demonstrations per task and robot, chosen by the seed
  seed=N                   seed of weights, data order and noise
  phases.NAME.steps=N      length of a phase; any other field of a phase likewise
  phases.NAME.batch_size=N, phases.NAME.learning_rate=X, ...
  --multirun phases.NAME.weights.actions=0.3,1,3 'run_dir=runs/lambda/${phases.NAME.weights.actions}'
                           one run after another, each into a folder of its own
  trainer=NAME             a file of configs/trainer: cpu (default), gpu, node (all its GPUs), cluster
                           (configs/slurm/train.sbatch)
  trainer.threads=N        CPU threads of torch
  trainer.devices=N        processes on this machine; phases.NAME.batch_size is that of each
  trainer.strategy=fsdp    weights, averages and optimiser states shared among them
  trainer.accumulate=N     pieces that each batch is computed in: less memory, more time
  trainer.compile=true     compiled blocks; trainer.checkpointing=selective or full: less memory, more time
  wandb.mode=MODE          offline (default), online or disabled

The composed configuration is printed by `python train.py experiment=NAME --cfg job`.
SIGTERM or SIGUSR1 to any rank saves and exits with 143; the same command then resumes exactly where it stopped.
"""


def main() -> None:
    """Composes the configuration with Hydra and runs the curriculum."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP)
        return
    # Threads that spin for long while they wait make a busy machine many times slower; read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    import hydra
    from omegaconf import DictConfig, OmegaConf

    from worldmodel.config import register_resolvers

    register_resolvers()

    @hydra.main(version_base="1.3", config_path="configs", config_name="train")
    def run(config: DictConfig) -> None:
        from worldmodel.parallel import start

        resolved = OmegaConf.to_container(config, resolve=True)
        assert isinstance(resolved, dict)
        start(resolved["trainer"])
        from worldmodel.curriculum import train

        print(f"checkpoint: {train({str(k): v for k, v in resolved.items()})}")

    try:
        run()
    except SystemExit as stop:
        if stop.code == 143:  # all were stopped together; after an error others may never come
            _leave()
        raise
    _leave()


def _leave() -> None:
    if "torch" in sys.modules:  # not where the configuration was only printed
        from worldmodel.ranks import leave

        leave()


if __name__ == "__main__":
    main()
