"""What changes pictures in training, and which instructions and pictures stage 1 is told about."""

import copy
from typing import Any

import pytest
import torch
from conftest import compose
from test_model import draws, future_of, observation_of

from worldmodel.checkpoint import build_model, make_spec
from worldmodel.contracts import Batch, ClipSpec, Observation
from worldmodel.data.align import text_ids
from worldmodel.data.transforms import hide, patched, zoom
from worldmodel.errors import ConfigError
from worldmodel.losses import understanding_loss


def test_zoomed_images_show_what_the_new_lens_sees():
    """A point of the scene keeps its colour: where the new intrinsics project it, the new image shows it."""
    spec = ClipSpec(height=64, width=64)
    o = observation_of(spec, batch=8)
    ramp = torch.linspace(0, 248, 64).round().to(torch.uint8)
    o = o._replace(rgb=ramp.expand_as(o.rgb).clone())
    k = torch.tensor([[60.0, 0, 30], [0, 60.0, 36], [0, 0, 1]]).expand_as(o.intrinsics)
    o = o._replace(intrinsics=k)
    z = zoom(o, 1.3, draws(8))
    changed = z.intrinsics[:, -1] != o.intrinsics[:, -1]
    assert 0 < changed.flatten(1).any(1).float().mean() < 1 and not changed[..., 2].any()
    assert torch.equal(z.rgb[:, :-1], o.rgb[:, :-1]) and torch.equal(z.intrinsics[:, :-1], o.intrinsics[:, :-1])
    ray = torch.tensor([0.1, -0.1, 1.0])
    for image, lens in zip(z.rgb[:, -1].flatten(0, 1), z.intrinsics[:, -1].flatten(0, 1), strict=True):
        u, v = (lens @ ray)[:2]
        seen = image[0, int(v), int(u) : int(u) + 1].float()
        assert abs(float(seen) - (36.0 - 0.5) * 248 / 63) < 6
    assert zoom(o, 1.0, draws(8)) is o


def test_patches_cover_part_of_half_the_pictures_with_their_own_pixels():
    """Every pixel has a colour of its own, so that what covers it is seen to come from the same picture."""
    b, v, h, w = 16, 2, 20, 24
    marks = torch.arange(b * v * h * w, dtype=torch.float32).reshape(b, v, 1, h, w)
    images = marks.expand(-1, -1, 3, -1, -1) + torch.tensor([0.0, 0.25, 0.5])[:, None, None]
    new = patched(images, 3, draws(b))
    assert torch.equal(new.floor(), new[:, :, :1].floor().expand_as(new)), "channels of a pixel go together"
    assert torch.equal(new[:, :, 0].long() // (h * w), marks[:, :, 0].long() // (h * w)), "no pixel of another picture"
    covered = (new != images).any(2).flatten(2).float().mean(-1)
    touched = covered.any(1)
    assert 0.2 < touched.float().mean() < 0.8 and (covered[touched] > 0).all() and covered.max() < 0.6
    assert torch.equal(patched(images[5:9], 3, draws(b).pick(range(5, 9))), new[5:9]), "rows do not know of one another"
    assert patched(images, 0, draws(b)) is images


def test_pictures_learn_from_the_camera_alone_where_they_are_told_to(tiny_model):
    model = copy.deepcopy(tiny_model).train()
    frames = torch.zeros(4, model.spec.history, dtype=torch.long)
    batch = Batch(observation_of(model.spec, 4), future_of(model.spec, 4), frames, list("abcd"))
    rates = {"points": 1.0, "touch": 1.0}
    taught = lambda part: any(p.grad is not None and p.grad.any() for p in part.parameters())  # noqa: E731
    for name, fused_teaches, images in (("force", False, False), ("camera", False, True), ("force", True, True)):
        model.zero_grad()
        understanding_loss(model, batch, rates, draws(4), fused_teaches=fused_teaches)[name].backward()
        assert taught(model.encoder.image) == images and taught(model.encoder.proprio) == (name == "force")


def reader(statistics: dict[str, Any], known_only: bool) -> tuple[Any, Observation]:
    """`kairos_tiny` with random weights, and two rows that differ in their instruction: one known, one new."""
    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny", f"model.normaliser.known_text_only={known_only}")
    model = build_model(config["model"], make_spec(config["data"]["spec"]), statistics).eval()
    o = observation_of(model.spec, 1)
    texts = ("Press the red button.", "Press the red button!")
    text = torch.stack([torch.from_numpy(text_ids(one, model.spec.text)) for one in texts])
    return model, Observation(*(t.expand(2, *t.shape[1:]) for t in o))._replace(text=text)


@pytest.mark.parametrize("known_only", [True, False])
def test_an_instruction_that_was_not_trained_on_counts_as_absent(statistics, known_only):
    model, o = reader(statistics, known_only)
    s = model.normaliser(o, model.grid)
    silent = model.normaliser(hide(o, ["text"]), model.grid)
    assert s.has_text.tolist() == [True, not known_only] and not silent.has_text.any()
    with torch.no_grad():
        told, untold = (model.remember(x, None).proposal for x in (s, silent))
    same = [torch.equal(told[i], untold[i]) for i in range(2)]
    assert same == [False, known_only]


def test_without_a_list_of_instructions_none_can_be_known(statistics):
    with pytest.raises(ConfigError, match="compute them again"):
        reader({"embodiments": statistics["embodiments"]}, True)
