"""Edits: what is kept is kept to the bit, what is hidden does not leak, and what is asked for reaches the answer."""

from typing import Any

import pytest
import torch
from conftest import compose
from test_conditioning import clip_of
from test_model import draws, generator
from torch import Tensor

from worldmodel.checkpoint import build_model, make_spec
from worldmodel.contracts import PAIR_KINDS, Batch, Future, Observation, Pair
from worldmodel.editing import (
    GREY,
    draw,
    look_from,
    painted,
    read_request,
    reference_pictures,
    replace_element,
    source_encoder,
)
from worldmodel.editing_losses import edit_loss
from worldmodel.errors import ConfigError
from worldmodel.geometry import fov_to_intrinsics, interpolate_poses, invert_se3, orbit, seen_from
from worldmodel.phases import Phase
from worldmodel.synthesis.source import cell_shares


@pytest.fixture
def editor(statistics):
    """The model of `kairos_tiny_edit`; none of its ways into the answer is zero."""
    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny_edit")
    model = build_model(config["model"], make_spec(config["data"]["spec"]), statistics).eval()
    for layer in [*model.denoiser.embed_out.values(), model.expert.embed_out]:
        torch.nn.init.normal_(layer.weight, std=0.2)
    for parameter in source_encoder(model).parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def square(model, o: Observation) -> Tensor:
    """A mask that begins and ends inside latent cells and moves."""
    spec = model.spec
    mask = torch.zeros(2, spec.history + spec.window, len(spec.cameras), spec.height, spec.width, dtype=torch.bool)
    for t in range(mask.shape[1]):
        mask[:, t, :, 12 : 30 + t, 20:45] = True
    return mask


def scribbled(o: Observation, f: Future, where: Tensor) -> tuple[Observation, Future]:
    """The same clip with other pixels under a mask."""
    history = o.rgb.shape[1]
    noise = torch.randint(0, 256, (*where.shape[:3], 3, *where.shape[3:]), generator=generator(5)).to(torch.uint8)
    rgb = torch.where(where.unsqueeze(3), noise, torch.cat([o.rgb, f.rgb], 1))
    return o._replace(rgb=rgb[:, :history]), f._replace(rgb=rgb[:, history:])


def edited(model, o: Observation, f: Future, mask: Tensor, **settings) -> Tensor:
    settings = {"text": o.text.flip(0)} | settings
    with torch.inference_mode():
        return model.edit(o, f, mask, generator=generator(), **settings)


def far(o: Observation, f: Future) -> tuple[Tensor, Tensor]:
    """Lenses and a path of other cameras."""
    path = torch.cat([o.camera_to_base[:, -1:], f.camera_to_base], 1).clone()
    path[..., :3, 3] += 0.2
    return o.intrinsics[:, -1], path


def test_outside_the_mask_pixels_are_those_of_the_recording(editor):
    o, f = clip_of(editor)
    mask = square(editor, o)
    new, raw = edited(editor, o, f, mask), edited(editor, o, f, mask, raw=True)
    later = mask[:, editor.spec.history :].unsqueeze(3).expand_as(new)
    assert torch.equal(new[~later], (f.rgb.float() / 255)[~later])
    assert torch.equal(new[later], raw[later]) and not torch.equal(new[later], (f.rgb.float() / 255)[later])


def test_what_is_blanked_out_does_not_leak_and_what_is_asked_for_does(editor):
    o, f = clip_of(editor)
    mask = square(editor, o)
    new = edited(editor, o, f, mask, raw=True)
    hidden = scribbled(o, f, mask)
    assert torch.equal(new, edited(editor, *hidden, mask, raw=True))
    assert not torch.equal(new, edited(editor, *scribbled(o, f, ~mask), mask, raw=True))
    shades, other = (edited(editor, *clip, mask, raw=True, blank=False) for clip in ((o, f), hidden))
    assert (shades - other).abs().max() > 1e-3
    words = edited(editor, o, f, mask, raw=True, text=o.text)
    picture = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    dark, light = (edited(editor, o, f, mask, raw=True, text=None, reference=p) for p in (picture, picture + 200))
    assert (new - words).abs().max() > 1e-3 and (dark - light).abs().max() > 1e-3
    # Of the recording's own instruction nothing is left.
    assert torch.equal(new, edited(editor, o._replace(text=o.text + 1), f, mask, raw=True, text=o.text.flip(0)))


def test_a_source_is_the_guess_of_an_untrained_network(editor, tiny_model):
    """All ways of a source into the network start at zero: where it answers nothing, the recording comes back."""
    o, f = clip_of(editor)
    mask = square(editor, o)
    for parameter in editor.denoiser.source.head.parameters():
        torch.nn.init.zeros_(parameter)
    rows = torch.zeros(2, dtype=torch.bool)
    with torch.inference_mode():
        request = read_request(editor, o, None)
        edit = replace_element(editor, o, f, mask & False, request, blank=rows)
        whole = editor.reconstruct(torch.cat([o.rgb[:, -1:], f.rgb], 1))[:, 1:]
        torch.testing.assert_close(draw(editor, edit, generator=generator()), whole, atol=1e-4, rtol=0)
        lens, path = o.intrinsics[:, -1], torch.cat([o.camera_to_base[:, -1:], f.camera_to_base], 1)
        same = editor.view(o, f, lens, path, generator=generator())
    assert (same - f.rgb.float() / 255)[:, :, :, :, 1:-1, 1:-1].abs().max() < 0.02
    fresh = build_model(
        compose("experiment=kairos_tiny_edit")["model"], editor.spec, {"embodiments": {"sawyer": editor_fields(editor)}}
    )
    assert all(
        not source_encoder(fresh).state_dict()[name].any() for name in ("cells.weight", "asked.2.weight", "head.weight")
    )
    with pytest.raises(ConfigError, match=r"synthesis.denoiser.source is null; see experiment=kairos_tiny_edit"):
        edited(tiny_model, o, f, mask)
    with pytest.raises(ConfigError, match="an instruction or a reference picture"):
        edited(editor, o, f, mask, text=None)


def editor_fields(model) -> dict:
    sizes = {"proprio": 18, "action": 4, "points": 3, "camera_translation": 3, "wrench": 18, "taxels": 3}
    return {name: {"mean": [0.1] * size, "std": [0.5] * size} for name, size in sizes.items()}


def test_a_hidden_view_does_not_leak_into_one_made_from_another(editor):
    o, f = clip_of(editor)
    lens, path = far(o, f)
    front = torch.zeros(2, 2, dtype=torch.long)

    def look(observation: Observation, future: Future, lens=lens, path=path) -> Tensor:
        with torch.inference_mode():
            return editor.view(observation, future, lens, path, generator=generator(), views=front)

    new = look(o, f)
    wrist = torch.zeros(2, editor.spec.history + editor.spec.window, 2, 64, 64, dtype=torch.bool)
    wrist[:, :, 1] = True
    assert torch.equal(new, look(*scribbled(o, f, wrist)))
    assert not torch.equal(new, look(*scribbled(o, f, ~wrist)))
    lenses = lens.clone()
    lenses[:, :, 0, 0] *= 2
    assert not torch.equal(new, look(o, f, lens=lenses)) and not torch.equal(new, look(o, f, path=path.flip(0)))


def test_training_teaches_every_new_layer_and_counts_rows_alike(editor):
    o, f = clip_of(editor)
    editor.train()
    batch = Batch(o, f, torch.zeros(2, editor.spec.history, dtype=torch.long), ["a", "b"])
    other = batch._replace(future=f._replace(rgb=f.rgb.flip(0)))
    pair = Pair(batch, other, square(editor, o), o.text.flip(0), torch.tensor([0, 1]))
    settings: dict[str, Any] = {"dropout": {}, "weights": {}, "huber": 0.1}
    losses = edit_loss(editor, pair, draws(), rates={"blank": 1.0, "reference": 1.0, "across": 1.0}, **settings)
    assert set(losses) == {"loss", "colour", *PAIR_KINDS}
    torch.testing.assert_close(losses["loss"], (losses["element"] + losses["colour"] + losses["view"]) / 2)
    words = edit_loss(editor, pair, draws(), rates={}, **{**settings, "weights": {"video": 0.0}})
    assert set(words) == {"loss", "colour"} and words["colour"] > 0
    losses["loss"].backward()
    for name, parameter in editor.denoiser.source.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    again = edit_loss(editor, pair, draws(), rates={"blank": 1.0, "reference": 1.0, "across": 1.0}, **settings)
    assert torch.equal(again["loss"], losses["loss"])
    nothing = f._replace(valid=torch.zeros_like(f.valid))
    ended = pair._replace(target=other._replace(future=nothing))
    assert edit_loss(editor, ended, draws(), rates={}, **{**settings, "weights": {"colour": 0.0}})["loss"] == 0


def test_a_coat_of_paint_is_flat_or_keeps_shades():
    rgb = torch.full((2, 1, 1, 3, 8, 8), 60, dtype=torch.uint8)
    rgb[..., 4:] = 180
    mask = torch.zeros(2, 1, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:6, :] = True
    new = painted(rgb, mask, torch.tensor([[0.8, 0.4, 0.0]]).expand(2, 3), torch.tensor([True, False]))
    assert torch.equal(new[:, :, :, :, :2], rgb[:, :, :, :, :2])
    assert new[0, 0, 0, :, 3, 1].tolist() == new[0, 0, 0, :, 3, 6].tolist() == [204, 102, 0]
    assert new[1, 0, 0, :, 3, 1].tolist() == [102, 51, 0] and new[1, 0, 0, :, 3, 6].tolist() == [255, 153, 0]


def test_masks_are_told_by_quarters_of_cells_and_steps():
    mask = torch.zeros(1, 8, 2, 16, 24, dtype=torch.bool)
    mask[0, 5, 1, 12:16, 8:12] = True  # second latent frame, its second step; row 1, column 1, its lower left quarter
    shares = cell_shares(mask, stride=4, spatial=8)
    assert shares.shape == (1, 2, 2, 16, 2, 3)
    assert shares.sum() == 1 and shares[0, 1, 1, 1 * 4 + 2, 1, 1] == 1


def test_a_reference_fills_its_picture():
    rgb = torch.full((2, 3, 64, 64), 10, dtype=torch.uint8)
    rgb[:, :, 16:24, 32:48] = 200
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[0, 16:24, 32:48] = True
    found = reference_pictures(rgb, mask)
    assert found.has.tolist() == [True, False]
    assert (found.rgb[0] == 200).all() and (found.rgb[1] == GREY).all()


def test_a_plane_is_seen_from_another_place_as_it_is():
    """Colours that are a linear function of the place in the plane can be predicted for any camera."""
    lens = fov_to_intrinsics(torch.tensor([0.9, 0.7]), 64, 64)
    down = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0])).repeat(2, 1, 1)
    down[:, :3, 3] = torch.tensor([[0.0, 0.0, 1.0], [0.3, -0.1, 0.8]])
    tilt = torch.tensor([[1.0, 0, 0], [0, 0.995, -0.0998], [0, 0.0998, 0.995]])
    down[1, :3, :3] = tilt @ down[1, :3, :3]

    def picture(k: int) -> Tensor:
        pixel = torch.stack(torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="xy"), -1)
        rays = torch.cat([pixel, torch.ones(64, 64, 1)], -1) @ torch.linalg.inv(lens[k]).T @ down[k, :3, :3].T
        ground = down[k, :3, 3] + rays * ((0.1 - down[k, 2, 3]) / rays[..., 2])[..., None]
        return ground[..., :2].movedim(-1, 0)

    moved, seen = seen_from(picture(0)[None], lens[:1], down[:1], lens[1:], down[1:], plane=0.1)
    assert 0.5 < seen.float().mean() < 1
    inner = seen[0] & (torch.nn.functional.avg_pool2d(seen.float(), 5, 1, 2)[0] == 1)
    torch.testing.assert_close(moved[0][:, inner], picture(1)[:, inner], atol=2e-3, rtol=0)
    poses = torch.stack([down[0], down[1]])[None]
    between = interpolate_poses(poses, 4)
    torch.testing.assert_close(between[0, -1], down[1], atol=1e-3, rtol=0)
    torch.testing.assert_close(between[0] @ invert_se3(between[0]), torch.eye(4).expand(4, 4, 4), atol=1e-5, rtol=0)
    assert between[0, 0, 2, 3] == pytest.approx(0.95)


def test_a_camera_goes_round_what_it_looks_at():
    """It stands 2 m away, 1 m up, and looks at the centre; x of the camera is to its right."""
    centre = torch.tensor([0.3, 0.1, 0.0])
    ahead = torch.tensor([0.0, 3**0.5 / 2, -0.5])
    pose = torch.eye(4)
    pose[:3, :3] = torch.stack([torch.tensor([1.0, 0, 0]), torch.tensor([0, -0.5, -(3**0.5) / 2]), ahead], 1)
    pose[:3, 3] = centre - 2 * ahead
    quarter, up = torch.tensor([torch.pi / 2, 0.0, 0.0]), torch.tensor([0.0, torch.pi / 6, 0.0])
    new = orbit(pose.expand(3, 4, 4), centre.expand(3, 3), quarter, up, torch.tensor([1.0, 1.0, 1.5]))
    away = new[:, :3, 3] - centre
    torch.testing.assert_close(away[0], torch.tensor([3**0.5, 0.0, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(away[1], torch.tensor([0.0, -1.0, 3**0.5]), atol=1e-5, rtol=0)
    torch.testing.assert_close(away.norm(dim=-1), torch.tensor([2.0, 2.0, 3.0]))
    torch.testing.assert_close(new[:, :3, 2], -away / away.norm(dim=-1, keepdim=True), atol=1e-5, rtol=0)


def test_mistakes_in_an_edit_phase_are_named():
    base: dict[str, Any] = {"name": "p", "trains": ("denoiser",), "steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    for change, message in (
        ({"objective": "edit"}, "weights of pairs belong to objective `edit`"),
        ({"objective": "tokeniser", "pairs": {"view": 1.0}}, "weights of pairs belong to objective `edit`"),
        ({"objective": "edit", "pairs": {"lights": 1.0}}, "pairs.lights is none of element, view"),
        ({"objective": "edit", "pairs": {"view": 1.0}, "rates": {"hide": 0.5}}, "rates.hide is none of blank"),
        ({"objective": "edit", "pairs": {"view": 1.0}, "rates": {"blank": 1.5}}, "lie in 0 to 1, not 1.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            Phase(**{**base, **change})


def test_a_clip_can_be_made_ready_without_a_reference_or_a_known_camera(editor):
    o, f = clip_of(editor)
    lens, path = far(o, f)
    blind = o._replace(has_camera=torch.zeros_like(o.has_camera))
    with torch.inference_mode():
        edit = look_from(editor, blind, f, lens, path)
    shown = (edit.pictures[:, 1:] + 1) * 127.5
    torch.testing.assert_close(shown, f.rgb.float(), atol=1e-3, rtol=0)
