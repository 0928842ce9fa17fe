"""The part of the report that shows edited clips."""

from collections.abc import Callable
from html import escape

from worldmodel.viz import video_data_uri, video_tag


def edit_section(edits: dict, table: Callable[[list[dict], bool], str]) -> str:
    """Show what `evaluate_edits` returned: figures beside baselines, drawn by `table`, then clips."""
    kinds = ", ".join(f"{number} clips of kind {kind}" for kind, number in edits["kinds"].items())
    intro = (
        f"{kinds}, of {edits['episodes']} held-out episodes. The simulator showed every clip twice: as it was, which "
        "is given to the model, and as it is asked for, which is the truth here. “Words” and “picture” is how an "
        "element was asked for, the old one blanked out; with “shades” it was shown. Outside the mask the pixels are "
        f"those of the recording: the largest difference there is {edits['outside']:g}."
    )
    clips = "".join(_clip(sample) for sample in edits["samples"])
    return f'<p>{intro}</p>{table([edits], True)}{table([edits], False)}<div class="samples">{clips}</div>'


def _clip(sample: dict) -> str:
    videos = "".join(
        video_tag(video_data_uri(*parts, fps=5), f"{escape(view)}: recorded | edited | true")
        for view, parts in sample["video"].items()
    )
    heading = f'<b>{escape(sample["asked"])}</b> <span class="interval">{escape(sample["key"])}</span>'
    return f'<div class="sample"><p>{heading}</p><div class="clips">{videos}</div></div>'
