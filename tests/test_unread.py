"""Told of a task that it was not trained on, the model predicts less than what the state alone reminds it of."""

import pytest
import torch
from conftest import compose
from test_model import future_of, generator
from test_transforms import reader

from worldmodel.checkpoint import build_model, make_spec
from worldmodel.errors import ConfigError

torch.set_num_threads(1)


def test_streams_go_a_share_of_the_way_and_actions_all_of_it(statistics):
    """Rows: a known instruction and a new one."""
    model, o = reader(statistics, True)
    for name, parameter in model.named_parameters():
        if "embed_out" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator(2))
    future = future_of(model.spec, 2)
    given = {"actions": torch.tensor([False, True])}

    def predict(share, mode="joint", **more):
        model.unread_share = share
        return model.predict(o, future, mode, generator=generator(3), **more)

    n, robot = model.normaliser, o.embodiment
    ways = {
        "points": (lambda p: p.points, o.points[:, -1:]),
        "camera": (lambda p: p.camera_to_base[..., :3, 3], o.camera_to_base[:, -1:, :, :3, 3]),
        "force": (lambda p: n.compress_wrench(p.wrench, robot), n.compress_wrench(o.wrench, robot).mean(2)[:, -1:]),
    }
    with torch.no_grad():
        whole, part = predict(1.0), predict(0.25)
        for read, now in ways.values():
            full, short = read(whole), read(part)
            torch.testing.assert_close(short[0], full[0])
            torch.testing.assert_close(short[1] - now[1], 0.25 * (full - now)[1], atol=1e-4, rtol=1e-3)
            assert (full - now)[1].abs().max() > 1e-2
        assert torch.equal(part.actions, whole.actions) and torch.equal(part.rgb, whole.rgb)
        known = [predict(share, "forward_dynamics") for share in (1.0, 0.25)]
        known += [predict(share, "video_prediction", given=given) for share in (1.0, 0.25)]
    for first, second in (known[:2], known[2:]):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "what is done is known"


def test_a_share_is_no_more_than_all(statistics):
    config = compose("experiment=kairos_tiny", "model.unread_share=1.5")
    with pytest.raises(ConfigError, match=r"unread_share is 1\.5; expected 0 to 1"):
        build_model(config["model"], make_spec(config["data"]["spec"]), statistics)
