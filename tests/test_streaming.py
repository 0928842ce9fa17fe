"""Streams of many frames: read piece by piece they are what they are when read at once, in constant memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import compose
from synthetic import made_up_dataset
from test_model import draws, future_of, generator, observation_of

from worldmodel.checkpoint import build_model, make_spec
from worldmodel.contracts import STREAMS, Batch, ClipSpec, Fused, Future, Observation, WorldState
from worldmodel.controllers import EagerPolicy
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset, Needs, Request
from worldmodel.data.live import observation_from_history
from worldmodel.data.mixture import Mixture, Source
from worldmodel.data.sampler import StreamLoader, StreamSampler
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, ContractError
from worldmodel.losses import clip_loss, consecutive, world_loss
from worldmodel.nn import rope_table
from worldmodel.streaming import read, roll_out
from worldmodel.synthesis.block import SynthesisBlock
from worldmodel.synthesis.state import carry
from worldmodel.synthesis.temporal import (
    Keys,
    block_ends,
    block_sizes,
    windowed_attention,
    windowed_attention_dense,
    windowed_attention_flex,
)


@pytest.mark.parametrize(("window", "dilation"), [(3, 1), (3, 2), (2, 3)])
def test_blocks_bound_how_far_frames_look_ahead(window, dilation):
    g = generator()
    b, tq, tk, n, e, d, blocks = 2, 5, 7, 3, 2, 8, (2, 1, 2)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)  # noqa: E731
    q, k, v = draw(b, tq, n, e, d), draw(b, tk, n, e, d), draw(b, tk, n, e, d)
    mask = torch.ones(b, tk, n, dtype=torch.bool)
    results = []
    for form in (windowed_attention, windowed_attention_dense):
        out = form(q, Keys(k, v, mask), window=window, dilation=dilation, blocks=blocks)
        results.append((out, torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)))
        (slope,) = torch.autograd.grad(out[:, 1].sum(), v)
        assert slope[:, : tk - tq + 2].any() and not slope[:, tk - tq + 2 :].any(), "a frame saw beyond its block"
    torch.testing.assert_close(results[0], results[1])
    with torch.no_grad():
        keys = Keys(k.float(), v.float(), mask)
        flex = windowed_attention_flex(q.float(), keys, window=window, dilation=dilation, blocks=blocks)
    torch.testing.assert_close(flex, results[0][0].float(), atol=1e-5, rtol=1e-5)


def test_blocks_end_with_the_newest_frame():
    assert block_sizes(5, 2) == (1, 2, 2) and block_sizes(4, 2) == (2, 2)
    assert block_sizes(3, None) is None and block_sizes(2, 4) is None
    assert block_ends(5, (1, 2, 2)) == [1, 3, 3, 5, 5]
    with pytest.raises(ConfigError, match=r"blocks of \[2, 2\] frames do not make up 5 frames"):
        block_ends(5, (2, 2))


@pytest.mark.parametrize("kind", ["swa", "dswa", "gated"])
def test_each_kind_of_layer_streams(kind):
    """Outputs of all frames, and what is kept of them, chunk by chunk as at once."""
    torch.manual_seed(0)
    b, t, n, width, chunk = 2, 16, 5, 24, 2
    settings = {"width": width, "heads": 2, "hidden": 32, "context": 8, "window": 3, "dilation": 3, "gate": 0.5}
    layer = SynthesisBlock(kind=kind, attention="folded", delta={}, **settings)
    x, mask = torch.randn(b, t, n, width), torch.rand(b, t, n) < 0.8
    mask[..., 0] = True
    place = torch.stack([torch.arange(t), torch.zeros(t), torch.zeros(t)], -1)[:, None].expand(-1, n, -1)
    rope, vectors = rope_table(place, width // 2), torch.randn(b, 1, n, 6, width) * 0.1
    context = Fused(torch.randn(b, 3, 8), torch.ones(b, 3, dtype=torch.bool), *[torch.zeros(())] * 3)
    with torch.no_grad():
        whole, last = layer(x, mask, vectors, rope, context, None, None, [chunk] * (t // chunk))
        past, parts = None, []
        for first in range(0, t, chunk):
            now = slice(first, first + chunk)
            out, own = layer(x[:, now], mask[:, now], vectors, tuple(r[now] for r in rope), context, past, None)
            past = carry(past, own, layer.reach)
            parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    if isinstance(past, Keys):
        assert past.k.shape[1] == layer.reach == (2 if kind == "swa" else 6)
        torch.testing.assert_close(past.k, last.k[:, -layer.reach :])
    else:
        assert past is not None
        torch.testing.assert_close(past.state, last.state, atol=1e-5, rtol=1e-4)


@pytest.fixture
def frame_by_frame(tiny_model):
    """The tiny model with history frames that do not look ahead, and a context that does not change with time."""
    tiny_model.denoiser.block = 1
    tiny_model.encoder.gives = "text"
    return tiny_model


def cut(observation: Observation, first: int, last: int) -> Observation:
    """Frames [first, last) of a long history."""
    series = ("rgb", "intrinsics", "camera_to_base", "points", "visible", "wrench", "taxels", "proprio")
    return observation._replace(**{name: getattr(observation, name)[:, first:last] for name in series})


def long_observation(spec: ClipSpec, frames: int) -> Observation:
    o = observation_of(replace(spec, history=frames))
    g = generator(9)
    poses = o.camera_to_base.clone()
    poses[..., :3, 3] = torch.randn((*poses.shape[:-2], 3), generator=g)
    return o._replace(camera_to_base=poses, visible=torch.rand(o.visible.shape, generator=g) < 0.5)


def stream(model, whole: Observation, frames: int, fresh: int):
    """The memory after each read: the history, then `fresh` frames at a time."""
    h = model.spec.history
    memory = read(model, cut(whole, 0, h))
    yield h, memory
    for end in range(h + fresh, frames + 1, fresh):
        memory = read(model, cut(whole, end - h, end), memory, fresh)
        yield end, memory


def test_the_streamed_model_is_the_whole_one(frame_by_frame):
    """All layers together: memory, velocities of the next chunk and of actions under both couplings."""
    model = frame_by_frame
    spec, frames = model.spec, 11
    whole = long_observation(spec, frames)
    g = generator(4)
    shapes = {"video": (2, 2, 2, 16, 8, 8), "camera": (2, 2, 2, 9), "points": (2, 2, 4, 3), "force": (2, 2, 3, 6)}
    state = WorldState(*(torch.randn(shapes[name], generator=g) for name in STREAMS))
    level, actions = torch.full((2, 4), 0.6), torch.randn(2, spec.chunk, spec.action, generator=g)
    with torch.no_grad():
        at_once = read(model, whole)
        *_, (end, streamed) = stream(model, whole, frames, 2)
        assert end == at_once.kept.frames == streamed.kept.frames == frames
        for a, b in zip(at_once.kept.tensors(), streamed.kept.tensors(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
        for coupling in ("history_only", "joint"):
            answers = [
                model.velocity(
                    memory, state=state, levels=level, actions=actions, action_level=level[:, 0], coupling=coupling
                )
                for memory in (at_once, streamed)
            ]
            torch.testing.assert_close(answers[0], answers[1], atol=2e-4, rtol=1e-3)
        short, _ = model.velocity(read(model, cut(whole, frames - 3, frames)), state=state, levels=level)
    assert (short["video"] - answers[0][0]["video"]).abs().max() > 1e-3, "older frames make no difference"


@pytest.mark.parametrize("kind", ["time", "step"])
def test_where_actions_stand_moves_with_the_frames(tiny_model, kind):
    """Attention depends on differences of positions alone, so a memory of many frames reads like one of few."""
    tiny_model.expert.rope_kind = kind
    tables = [tiny_model.expert.rope(later) for later in (0, 5)]
    frames = [rope_table(torch.tensor([[2.0 + later, 1, 3]]), tiny_model.expert.head_dim) for later in (0, 5)]
    angles = [torch.atan2(t[1], t[0]) - torch.atan2(f[1], f[0]) for t, f in zip(tables, frames, strict=True)]
    torch.testing.assert_close(angles[0].sin(), angles[1].sin(), atol=1e-5, rtol=0)
    torch.testing.assert_close(angles[0].cos(), angles[1].cos(), atol=1e-5, rtol=0)


SETTINGS = {"drop": (), "dropout": {}, "draws": 1, "weights": {}, "insulate": False, "huber": None}
SETTINGS |= {"given": {"camera": 0.5, "points": 0.5}, "absent": 0.3}


def consecutive_clips(spec: ClipSpec, chunks: int) -> tuple[Observation, Batch]:
    """A long history of two episodes, and its clips in the order in which they train."""
    h, f = spec.history, spec.future
    whole = long_observation(spec, h + (chunks - 1) * f)
    views = [cut(whole, c * f, c * f + h) for c in range(chunks)]
    futures = [future_of(spec)._replace(points=torch.randn(2, f, 4, 3, generator=generator(c))) for c in range(chunks)]
    mix = lambda parts: [torch.stack(xs, 1).flatten(0, 1) for xs in zip(*parts, strict=True)]  # noqa: E731
    frame = torch.zeros(2 * chunks, h, dtype=torch.int64)
    return whole, Batch(Observation(*mix(views)), Future(*mix(futures)), frame, [str(i) for i in range(2 * chunks)])


@pytest.mark.parametrize("mode", ["video_prediction", "policy", "joint"])
def test_a_carried_memory_trains_like_the_whole_clip(frame_by_frame, mode):
    """Loss and every gradient equal those of reading the whole history anew before each clip; cut, gradients differ."""
    model, chunks = frame_by_frame, 3
    spec = model.spec
    whole, batch = consecutive_clips(spec, chunks)
    parameters = dict(model.denoiser.named_parameters()) | dict(model.expert.named_parameters())

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if x is None else x for (n, p), x in zip(parameters.items(), found, strict=True)}

    latents = model.history_latents(batch.observation).detach()
    carried, cut_off = (
        world_loss(model, batch, latents, draws(2, 1), mode=mode, chunks=chunks, truncate=truncate, **SETTINGS)["loss"]
        for truncate in (False, True)
    )
    g, total = draws(2, 1), torch.zeros(())
    for number, part in enumerate(consecutive(batch, chunks)):
        long = cut(whole, 0, spec.history + number * spec.future)
        own = model.history_latents(long).detach()
        losses, memory = clip_loss(model, part._replace(observation=long), own, g, mode=mode, **SETTINGS)
        assert memory.kept.frames == long.rgb.shape[1]
        total = total + losses["loss"] / chunks
    torch.testing.assert_close(carried, total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cut_off, carried)
    expected, full, short = gradients(total), gradients(carried), gradients(cut_off)
    scale = max(float(x.abs().max()) for x in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(full[name], value, atol=1e-4 * scale, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert max(float((short[name] - value).abs().max()) for name, value in full.items()) > 1e-3 * scale


def test_a_history_shorter_than_the_future_cannot_be_carried(tiny_model):
    spec = tiny_model.spec
    _, batch = consecutive_clips(spec, 2)
    latents = tiny_model.history_latents(batch.observation)
    tiny_model.spec = replace(spec, history=1)
    with pytest.raises(ConfigError, match=r"data\.spec\.history is 1 and data\.spec\.future 2"):
        world_loss(tiny_model, batch, latents, draws(), mode="policy", chunks=2, **SETTINGS)


def test_a_rollout_goes_on_in_constant_memory(tiny_model):
    model = tiny_model
    o = observation_of(model.spec)
    alone = future_of(model.spec)
    told = lambda number: alone.actions * (1 + number)  # noqa: E731
    sizes = []
    with torch.no_grad():
        direct = model.predict(o, alone, "forward_dynamics", generator=generator())
    for number, (p, memory) in enumerate(roll_out(model, o, chunks=6, generator=generator(), actions=told)):
        if number == 0:
            torch.testing.assert_close(p.rgb, direct.rgb, atol=1e-5, rtol=0)
            torch.testing.assert_close(p.points, direct.points)
        torch.testing.assert_close(p.actions, told(number), atol=1e-5, rtol=1e-4)
        assert all(torch.isfinite(x).all() for x in p)
        assert memory.kept.frames == model.spec.history + number * model.spec.future
        sizes.append(memory.kept.nbytes)
    assert sizes[2:] == sizes[2:3] * 4, "the memory grows with the rollout"
    other = next(roll_out(model, o, chunks=1, generator=generator(), actions=lambda _: -3 * alone.actions))[0]
    assert (other.points - direct.points).abs().max() > 1e-4, "the actions make no difference"
    for actions in ("policy", None):
        *_, (p, _) = roll_out(model, o, chunks=2, generator=generator(), actions=actions)
        assert p.rgb.shape == alone.rgb.shape and bool(p.actions.std(1).max() > 1e-6) == (actions == "policy")
    with pytest.raises(ConfigError, match="actions of a rollout: 'random'"):
        next(roll_out(model, o, chunks=1, generator=generator(), actions="random"))


def test_a_rollout_may_foretell_more_frames_than_its_history_has(statistics):
    """As the large experiments do: every foretold frame is read, stage 1 reads as many as ever."""
    config = compose("experiment=kairos_tiny", "data.spec.history=2", "data.spec.future=4")
    model = build_model(config["model"], make_spec(config["data"]["spec"]), statistics).eval()
    stream = roll_out(model, observation_of(model.spec), chunks=3, generator=generator())
    frames = [(memory.kept.frames, p.rgb.shape[1]) for p, memory in stream]
    assert frames == [(2, 16), (6, 16), (10, 16)]


def flat_observation(spec: ClipSpec, step: int) -> dict[str, np.ndarray]:
    """Made-up values of one control step."""
    rng = np.random.default_rng(step)
    one: dict[str, np.ndarray] = {}
    for camera in spec.cameras:
        one[f"rgb.{camera}"] = rng.integers(0, 256, (spec.height, spec.width, 3), np.uint8)
        one[f"intrinsics.{camera}"] = np.array([[60, 0, 32], [0, 60, 32], [0, 0, 1]], np.float32)
        pose = np.eye(4, dtype=np.float32)
        pose[:3, 3] = rng.normal(size=3)
        one[f"camera_to_base.{camera}"] = pose
    one["points"], one["visible"] = rng.normal(size=(4, 3)).astype(np.float32), np.ones(4, bool)
    one["wrench"] = rng.normal(size=(3, 6)).astype(np.float32)
    one["taxels"] = rng.normal(size=(3, *spec.taxels)).astype(np.float32)
    one["proprio"] = rng.normal(size=spec.proprio).astype(np.float32)
    return one


def test_a_policy_that_keeps_its_memory_acts_as_if_told_the_whole_history_again(frame_by_frame, statistics):
    model = frame_by_frame
    model.metadata = {"statistics": statistics}
    spec, steps = model.spec, [{**flat_observation(model.spec, i), "instruction": "Push."} for i in range(25)]
    policy, forgetful = EagerPolicy(model, stateful=True), EagerPolicy(model)
    noise, wanted = np.random.default_rng(0), {8: 3, 12: 4, 20: 6, 24: 7}
    for i, step in enumerate(steps):
        policy.observe(step)
        forgetful.observe(step)
        if i not in wanted:
            continue
        answer, short = policy.act(), forgetful.act()
        whole = observation_from_history(steps[: i + 1], replace(spec, history=wanted[i]))
        drawn = torch.from_numpy(noise.standard_normal((1, spec.chunk, spec.action), dtype=np.float32))
        with torch.inference_mode():
            again = model.denoise_actions(read(model, whole), drawn)
            again = model.normaliser.restore("action", again, whole.embodiment)[0, :, :4].numpy()
        np.testing.assert_allclose(answer, again, atol=2e-4, rtol=1e-3)
        assert (i == 8) == bool(np.allclose(answer, short, atol=1e-5)), "what is older makes no difference"
    policy.observe(steps[0])
    with pytest.raises(ContractError, match=r"1 control steps since the last call; .* every 4 steps"):
        policy.act()
    policy.reset()
    policy.observe(steps[0])
    policy.act()


def test_clips_that_follow_one_another_come_in_consecutive_rows(tmp_path):
    root = made_up_dataset(tmp_path / "made", {("sawyer_osc", "lift"): 2}, length=30)
    spec = ClipSpec(cameras=("front",), embodiments=("sawyer_osc",), height=16, width=16)
    reader = ShardReader(root)
    dataset = ClipDataset(reader, spec, split="train")
    ahead, there = collate([dataset[Request(3, ahead=2)]]), collate([dataset[3 + 2 * spec.window]])
    assert ahead.key == there.key and torch.equal(ahead.frame, there.frame)
    for part, other in zip((*ahead.observation, *ahead.future), (*there.observation, *there.future), strict=True):
        assert torch.equal(part, other)
    past_the_end = collate([dataset[Request(3, ahead=9)]])
    assert past_the_end.frame.tolist() == [[29, 29, 29]]
    mixture = Mixture([Source(root=str(root))], {str(root): reader}, spec)
    loader = StreamLoader(mixture, StreamSampler(mixture.sizes, 2, seed=0), 0, lambda _: Needs(chunks=3))
    batch = next(iter(loader))
    keys = [key.rsplit("@", 1) for key in batch.key]
    assert len(keys) == 6
    for row in range(0, 6, 3):
        assert len({key for key, _ in keys[row : row + 3]}) == 1
        assert [int(step) - int(keys[row][1]) for _, step in keys[row : row + 3]] == [0, 8, 16]
