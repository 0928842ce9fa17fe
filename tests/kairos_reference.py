"""The published video transformer written out from its description, by its public names: what ours must equal.
Both weight mappings carry the number of heads under `heads`.

One clip without batch: frames F, rows and columns of patches, tokens N. Dense masks, complex rotations, the delta rule
token by token: slow and plain.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def perceptron(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}.2", F.silu(linear(w, f"{name}.0", x)))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def plain_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """x (N, heads, d), angle (N, d / 2): interleaved pairs as complex numbers, in float64."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle).unsqueeze(1)).flatten(-2).to(x.dtype)


def video_angles(frames: int, rows: int, columns: int, head_dim: int) -> Tensor:
    pairs = head_dim // 2
    third = pairs // 3
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).double()
    parts = []
    for axis, count in enumerate((pairs - 2 * third, third, third)):
        frequency = 1.0 / 10000 ** (torch.arange(0, 2 * count, 2).double() / (2 * count))
        parts.append(grid[:, axis : axis + 1] * frequency)
    return torch.cat(parts, -1)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """q (N, A), k and v (M, A), already rotated, mask (N, M)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def gated_delta(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    def short(letter: str) -> Tensor:
        y = linear(w, f"{name}.{letter}_proj", x)
        kernel = w[f"{name}.{letter}_conv1d.weight"]
        y = F.conv1d(F.pad(y.T, (kernel.shape[-1] - 1, 0)).unsqueeze(0), kernel, groups=len(kernel))[0].T
        return F.silu(y).unflatten(-1, (heads, -1))

    q, k, v = short("q"), short("k"), short("v")
    unit = lambda y: y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt()  # noqa: E731
    q, k = unit(q) * q.shape[-1] ** -0.5, unit(k)
    g = -w[f"{name}.A_log"].exp() * F.softplus(linear(w, f"{name}.a_proj", x) + w[f"{name}.dt_bias"])
    beta = linear(w, f"{name}.b_proj", x).sigmoid()
    state = torch.zeros(heads, q.shape[-1], v.shape[-1])
    out = []
    for i in range(len(x)):
        state = state * g[i].exp()[:, None, None]
        error = v[i] - torch.einsum("hkv,hk->hv", state, k[i])
        state = state + torch.einsum("h,hk,hv->hkv", beta[i], k[i], error)
        out.append(torch.einsum("hkv,hk->hv", state, q[i]))
    gate = linear(w, f"{name}.g_proj", x).unflatten(-1, (heads, -1))
    o = rms(torch.stack(out), w[f"{name}.o_norm.weight"]) * F.silu(gate)
    return linear(w, f"{name}.o_proj", o.flatten(1))


def time_embedding(w: Weights, t: Tensor) -> tuple[Tensor, Tensor]:
    """Timesteps (N,) -> (N, W) and (N, 6, W)."""
    size = w["time_embedding.0.weight"].shape[1]
    frequency = 10000.0 ** (-torch.arange(size // 2).double() / (size // 2))
    angle = t.double().unsqueeze(-1) * frequency
    e = perceptron(w, "time_embedding", torch.cat([angle.cos(), angle.sin()], -1).float())
    return e, linear(w, "time_projection.1", F.silu(e)).unflatten(-1, (6, -1))


def block(
    w: Weights, name: str, x: Tensor, vectors: Tensor, mix: Callable[[Tensor], Tensor], context: Tensor
) -> Tensor:
    heads = int(w["heads"])
    scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = (vectors + w[f"{name}.modulation"]).unbind(1)
    x = x + gate_a * mix(plain_norm(x) * (1 + scale_a) + shift_a)
    y = F.layer_norm(x, x.shape[-1:], w[f"{name}.cross_attn_norm.weight"], w[f"{name}.cross_attn_norm.bias"], 1e-6)
    cross = f"{name}.cross_attn"
    q = rms(linear(w, f"{cross}.q", y), w[f"{cross}.norm_q.weight"])
    k = rms(linear(w, f"{cross}.k", context), w[f"{cross}.norm_k.weight"])
    x = x + linear(w, f"{cross}.o", attention(q, k, linear(w, f"{cross}.v", context), heads))
    return x + gate_f * perceptron(w, f"{name}.ffn", plain_norm(x) * (1 + scale_f) + shift_f)


def projections(w: Weights, name: str, x: Tensor, angle: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = int(w["heads"])
    turned = []
    for letter in "qk":
        y = rms(linear(w, f"{name}.{letter}", x), w[f"{name}.norm_{letter}.weight"])
        turned.append(rotate(y.unflatten(-1, (heads, -1)), angle).flatten(1))
    return turned[0], turned[1], linear(w, f"{name}.v", x)


def kairos(
    video: Weights,
    action: Weights,
    *,
    pattern: list[str],
    latents: Tensor,
    history: int,
    t: float,
    actions: Tensor,
    t_action: float,
    text: Tensor,
    proprio: Tensor,
) -> tuple[Tensor, Tensor]:
    """latents (C, F, h, w) with `history` clean frames first, actions (A, D), text (M, T) -> velocities of both."""
    heads = int(video["heads"])
    text = torch.cat([text, perceptron(action, "proprio_encoder", proprio.unsqueeze(0))])
    x = F.conv3d(latents.unsqueeze(0), video["patch_embedding.weight"], video["patch_embedding.bias"], stride=(1, 2, 2))
    _, _, frames, rows, columns = x.shape
    x = x[0].flatten(1).T
    n = rows * columns
    frame = torch.arange(frames).repeat_interleave(n)
    e, vectors = time_embedding(video, torch.where(frame < history, 0.0, t))
    context = perceptron(video, "text_embedding", text)
    angle = video_angles(frames, rows, columns, x.shape[1] // heads)
    a = linear(action, "action_encoder", actions)
    _, action_vectors = time_embedding(action, torch.tensor([t_action]))
    action_context = perceptron(action, "text_embedding", text)
    pairs = x.shape[1] // heads // 2
    action_angle = torch.arange(len(a)).double()[:, None] * 10000 ** (-torch.arange(pairs).double() / pairs)
    difference = frame[None] - frame[:, None]
    past = (frame < history)[None] | (frame >= history)[:, None]
    for i, kind in enumerate(pattern):
        name = f"blocks.{i}"
        seen: list[tuple[Tensor, Tensor]] = []

        def mix(y: Tensor, kind: str = kind, name: str = name, seen: list = seen) -> Tensor:
            if kind == "gated":
                return gated_delta(video, f"{name}.gated_delta", y, heads)
            step = 4 if kind == "dswa" else 1
            mask = (difference % step == 0) & (difference.abs() < 3 * step) & past
            q, k, v = projections(video, f"{name}.self_attn", y, angle)
            seen.append((k[: history * n], v[: history * n]))
            return linear(video, f"{name}.self_attn.o", attention(q, k, v, heads, mask))

        def act(y: Tensor, name: str = name, seen: list = seen) -> Tensor:
            q, k, v = projections(action, f"{name}.self_attn", y, action_angle)
            k, v = (torch.cat([*(pair[j] for pair in seen), own]) for j, own in ((0, k), (1, v)))
            return linear(action, f"{name}.self_attn.o", attention(q, k, v, heads))

        x = block(video, name, x, vectors, mix, context)
        a = block(action, name, a, action_vectors, act, action_context)
    shift, scale = (e.unsqueeze(1) + video["head.modulation"]).unbind(1)
    out = linear(video, "head.head", plain_norm(x) * (1 + scale) + shift)
    out = out.unflatten(0, (frames, rows, columns)).unflatten(-1, (2, 2, -1))
    return out.permute(5, 0, 1, 3, 2, 4).flatten(4).flatten(2, 3), linear(action, "head", a)
