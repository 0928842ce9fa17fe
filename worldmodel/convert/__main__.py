"""Command line of the conversions: `python -m worldmodel.convert kairos SRC OUT`."""

import argparse
import sys
from pathlib import Path

from worldmodel.errors import WorldModelError

DESCRIPTION = """\
Turn weights of other projects into ours, and back.

  python -m worldmodel.convert kairos kairos-4B-robot.safetensors init.safetensors
  python train.py experiment=kairos_base init=init.safetensors data.root=...
  python -m worldmodel.convert kairos runs/kairos_base theirs.safetensors --to-kairos
"""
KAIROS = """\
Kairos 3: the video transformer and, where the file has one, the action transformer.

SRC is a public safetensors file; its names may begin with pipe.dit., dit. or nothing. Sizes are read from a few of its
tensors, then every name and shape is checked against them: a file with anything missing, unexpected or of another shape
is refused and the tensors are named. No value is changed, so there and back gives the same bytes.

OUT is a safetensors file of our names. `train.py experiment=kairos_base init=OUT` starts from it: data.spec.action and
data.spec.proprio must be those of the weights (14 for RoboTwin), encoders.width the width of the text features they
were trained with (2048 for Qwen3.5-2B, 3584 for Qwen2.5-VL-7B). What kairos_base has beside the published network
(camera, point and force streams, rays, anchors, embodiments) starts untrained; with encoders=published
synthesis=published policy=published and one camera there is no such thing.

With --to-kairos, SRC is a run folder or a safetensors file of ours and OUT the public form. What only we have is
refused unless --drop-added leaves it out.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 a file is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m worldmodel.convert",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    formats = parser.add_subparsers(dest="format", required=True)
    kairos = formats.add_parser(
        "kairos",
        help="public Kairos 3 weights",
        description=KAIROS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kairos.add_argument("src", type=Path, metavar="SRC", help="file to read")
    kairos.add_argument("out", type=Path, metavar="OUT", help="file to write, *.safetensors")
    kairos.add_argument("--to-kairos", action="store_true", help="from ours to the public form")
    kairos.add_argument("--drop-added", action="store_true", help="with --to-kairos: leave out what only we have")
    kairos.add_argument("--force", action="store_true", help="replace OUT if it exists")
    given = parser.parse_args(arguments)
    from worldmodel.convert.kairos import convert_file

    try:
        count = convert_file(given.src, given.out, back=given.to_kairos, drop_added=given.drop_added, force=given.force)
    except WorldModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: {count} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
