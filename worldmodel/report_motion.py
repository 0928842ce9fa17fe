"""The part of the report that shows what a model took for moving: frames with masks over them."""

import base64
import io
from collections.abc import Mapping
from html import escape

import numpy as np

from worldmodel.contracts import MOVERS
from worldmodel.motion_evaluation import Overlay
from worldmodel.viz import PALETTE

_TINT = 0.55
"""Share of the colour of a mask in the pixels that it covers."""
_SCALE = 2
_COLOURS = (3, 6, 7)
"""Places in the palette: the colours that the arm and the objects have where a page shows masks of the data."""


def motion_section(offline: list[dict], split_names: Mapping[str, str]) -> str:
    """One clip of every task, split by split: what was found to move over what does."""
    colours = ", ".join(f'<span style="color:rgb{colour_of(m)}">&#9632;</span> {name}' for m, name in enumerate(MOVERS))
    parts = [
        f"<p>Frames of a clip by view, above with the masks that were found, below with the true ones: {colours}.</p>"
    ]
    for result in offline:
        if shown := result.get("overlays"):
            parts.append(f"<h3>{split_names[result['split']]}</h3>")
            parts += [_figure(overlay) for overlay in shown]
    return "".join(parts)


def colour_of(slot: int) -> tuple[int, int, int]:
    """Red, green and blue of a slot."""
    red, green, blue = (int(level) for level in PALETTE[_COLOURS[slot]])
    return red, green, blue


def painted(frames: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Frames (..., 3, h, w) uint8 with masks (..., M, h, w) bool over them, each in its colour: (..., h, w, 3)."""
    picture = np.moveaxis(frames, -3, -1).astype(np.float32)
    for m in range(masks.shape[-3]):
        shown = masks[..., m, :, :, None]
        picture = np.where(shown, (1 - _TINT) * picture + _TINT * np.array(colour_of(m), np.float32), picture)
    return picture.round().astype(np.uint8)


def sheet(overlay: Overlay) -> np.ndarray:
    """(2 V h', T w', 3) uint8: frames side by side, for each view what was found above what is true."""
    found, true = (painted(overlay.rgb, masks) for masks in (overlay.found, overlay.true))
    rows = [np.concatenate(list(part[:, v]), 1) for v in range(found.shape[1]) for part in (found, true)]
    return np.concatenate(rows).repeat(_SCALE, 0).repeat(_SCALE, 1)


def _figure(overlay: Overlay) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(sheet(overlay)).save(buffer, format="PNG")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    clip = overlay.clip
    caption = f"<b>{escape(clip.task)}</b> {escape(clip.episode)}, step {clip.step}"
    return f'<figure><img src="{source}" alt="{escape(clip.task)}"><figcaption>{caption}</figcaption></figure>'
