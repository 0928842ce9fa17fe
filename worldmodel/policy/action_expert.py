"""The action transformer: one block beside each block of the video transformer, joined by attention (mixture of
transformers): own weights, queries over the concatenation of its own keys and those of the video."""

import torch
from torch import Tensor, nn

from worldmodel.contracts import Fused, Senses
from worldmodel.errors import ConfigError
from worldmodel.nn import (
    CrossAttention,
    FeedForward,
    TimeEmbedding,
    apply_rope,
    attend,
    modulate,
    modulation_table,
    rope_table,
)
from worldmodel.policy.foresight import Foresight
from worldmodel.policy.realtime import Decided
from worldmodel.policy.state_policy import StatePolicy, measure

ROPES = ("time", "step")


class ActionBlock(nn.Module):
    """AdaLN -> joint attention -> cross-attention to the context -> feed-forward."""

    def __init__(self, *, width: int, attention_width: int, heads: int, hidden: int, context: int, gate: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, attention_width) for _ in range(3))
        self.q_norm, self.k_norm = (nn.RMSNorm(attention_width, eps=1e-6) for _ in range(2))
        self.out = nn.Linear(attention_width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.cross_norm = nn.LayerNorm(width, eps=1e-6)
        self.cross = CrossAttention(width=width, context=context, heads=heads, inner=attention_width)
        self.feed_forward = FeedForward(width=width, hidden=hidden)
        self.table = modulation_table(width, gate)

    def project(self, a: Tensor, vectors: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """a (B, A, W), vectors (B, 1 or A, 6, W) -> q, k, v (B, A, E, d), rotated."""
        scale, shift = (vectors + self.table)[..., :2, :].unbind(-2)
        x = modulate(self.norm(a), scale, shift)
        q = self.q_norm(self.q(x)).unflatten(-1, (self.heads, -1))
        k = self.k_norm(self.k(x)).unflatten(-1, (self.heads, -1))
        return apply_rope(q, rope), apply_rope(k, rope), self.v(x).unflatten(-1, (self.heads, -1))

    def forward(
        self, a: Tensor, vectors: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, context: Fused
    ) -> Tensor:
        """Joint attention of q over all keys k, v (B, M, E, d) under mask (B, M), then context and feed-forward."""
        _, _, gate_a, scale_f, shift_f, gate_f = (vectors + self.table).unbind(-2)
        a = a + gate_a * self.out(attend(q, k, v, mask[:, None, None]).flatten(-2))
        a = a + self.cross(self.cross_norm(a), context.tokens, context.mask)
        return a + gate_f * self.feed_forward(modulate(self.norm(a), scale_f, shift_f))


class ActionExpert(nn.Module):
    """Velocity, or clean value, of a noisy chunk of actions.

    What the robot measures now enters as one token of the context: features of the state policy `state` joined with the
    context, or, without one, two layers over the newest proprioception. `shares_token` gives that token to the video
    transformer too; `conditioned` lets it modulate every block beside the timestep. `slots` are learned embeddings of
    the place in the chunk and of the embodiment. `rope` places actions by their `time` between the video's frames, or
    by their number in the chunk alone (`step`). `embed_context`, `gate`: as in the video transformer. With no state
    policy, a shared token, an embedded context and no slots, condition or modulated head this is the network of Kairos
    3.
    """

    def __init__(
        self,
        *,
        width: int,
        attention_width: int,
        heads: int,
        hidden: int,
        context: int,
        layers: int,
        action: int,
        chunk: int,
        stride: int,
        history: int,
        embodiments: int,
        state: StatePolicy | None,
        foresight: Foresight | None = None,
        proprio: int = 0,
        shares_token: bool = False,
        conditioned: bool = True,
        slots: bool = True,
        modulated_head: bool = True,
        rope: str = "time",
        embed_context: bool = False,
        gate: float = 0.5,
        frequencies: int = 256,
    ) -> None:
        super().__init__()
        if rope not in ROPES:
            raise ConfigError(f"policy.expert.rope: unknown {rope!r}; one of {', '.join(ROPES)}")
        if state is None and proprio < 1:
            raise ConfigError("policy.expert: without a state policy, `proprio` says how long the measured state is")
        if state is None and foresight is not None:
            raise ConfigError("policy.expert.foresight says what the state policy will see, but `state` is null")
        self.head_dim, self.rope_kind, self.shares_token = attention_width // heads, rope, shares_token
        self.register_buffer("steps", history - 1 + torch.arange(1, chunk + 1) / stride, persistent=False)
        self.embed_in = nn.Linear(action, width)
        self.position = nn.Parameter(torch.randn(chunk, width) * 0.5) if slots else None
        self.embodiment = nn.Embedding(embodiments, width) if slots else None
        self.state, self.foresight = state, foresight
        size = proprio if state is None else state.out.in_features + context
        self.token = FeedForward(width=size, hidden=context, out=context)
        self.condition = FeedForward(width=context, hidden=context, out=width) if conditioned else None
        self.embed_context = FeedForward(width=context, hidden=width, out=width) if embed_context else None
        self.time = TimeEmbedding(width=width, frequencies=frequencies)
        self.blocks = nn.ModuleList(
            ActionBlock(
                width=width,
                attention_width=attention_width,
                heads=heads,
                hidden=hidden,
                context=width if embed_context else context,
                gate=gate,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_table = nn.Parameter(torch.randn(2, width) / width**0.5) if modulated_head else None
        self.embed_out = nn.Linear(width, action)
        nn.init.zeros_(self.embed_out.weight)
        nn.init.zeros_(self.embed_out.bias)

    def extend(
        self, context: Fused, senses: Senses, seen: Tensor | None, decided: Decided | None = None
    ) -> tuple[Fused, Tensor | None, Tensor | None]:
        """Adds what the robot measures now as one token, and as the condition of every block beside the timestep.

        `seen` (B, K, 3) are the points as stage 1 believes them to be. With `decided` actions it is what will be
        measured when they are done, where there is foresight. Returns the context with the token, the condition (B, W)
        and the state policy's proposal (B, A, D), which the transformer corrects, where it has them.
        """
        if self.state is None:
            present, proposal = senses.has_proprio, None
            token = self.token(senses.proprio[:, -1] * present.unsqueeze(-1)) * present.unsqueeze(-1)
        else:
            features, proposal = self.propose(context.instruction, senses, seen, decided)
            token = self.token(torch.cat([features, self.mean(context)], -1))
            present = torch.ones_like(senses.has_proprio)
        tokens = torch.cat([context.tokens, token.unsqueeze(1)], 1)
        mask = torch.cat([context.mask, present.unsqueeze(1)], 1)
        condition = None if self.condition is None else self.condition(token)
        return context._replace(tokens=tokens, mask=mask), condition, proposal

    def propose(
        self, instruction: Tensor, senses: Senses, seen: Tensor | None, decided: Decided | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (B, hidden) and proposal (B, A, D) of the state policy; arguments as in `extend`.

        Raises `ConfigError` if there is none.
        """
        if self.state is None:
            raise ConfigError("this model proposes nothing from the measured state: policy.expert.state is null")
        now, known = measure(senses, seen), None if self.foresight is None else decided
        if self.foresight is not None and known is not None:
            now = self.foresight.after(now, known, senses.embodiment)
        features, proposal = self.state(now, instruction, senses.embodiment)
        return features, proposal if known is None else known.after(proposal)

    def read(self, context: Fused) -> Fused:
        """The context as the blocks read it."""
        return context if self.embed_context is None else context._replace(tokens=self.embed_context(context.tokens))

    def mean(self, context: Fused) -> Tensor:
        """Mean of the present context tokens (B, context)."""
        weight = context.mask.unsqueeze(-1).to(context.tokens.dtype)
        return (context.tokens * weight).sum(1) / weight.sum(1).clamp(min=1.0)

    def rope(self, later: int = 0) -> tuple[Tensor, Tensor]:
        """Rotary table (A, d / 2): an action stands at its time, in latent frames, between the video's frames, or at
        its number in the chunk. Where more frames came before than the history has, all positions are `later`."""
        steps = self.get_buffer("steps")
        if self.rope_kind == "step":
            table = rope_table(torch.arange(len(steps), device=steps.device).unsqueeze(-1), self.head_dim)
        else:
            zero = torch.zeros_like(steps)
            table = rope_table(torch.stack([steps, zero, zero], -1), self.head_dim)
        if later == 0:
            return table
        cos, sin = table
        shift_cos, shift_sin = rope_table(torch.tensor([[later, 0, 0]], device=steps.device), self.head_dim)
        return cos * shift_cos - sin * shift_sin, sin * shift_cos + cos * shift_sin

    def embed(self, actions: Tensor, embodiment: Tensor) -> Tensor:
        """Normalised actions (B, A, D) -> tokens (B, A, W)."""
        x = self.embed_in(actions)
        if self.position is None or self.embodiment is None:
            return x
        return x + self.position + self.embodiment(embodiment).unsqueeze(1)

    def decode(self, a: Tensor, embedding: Tensor) -> Tensor:
        """Tokens (B, A, W) and timestep embedding (B, 1 or A, W) -> velocity (B, A, D)."""
        if self.head_table is None:
            return self.embed_out(a)
        shift, scale = (embedding.unsqueeze(-2) + self.head_table).unbind(-2)
        return self.embed_out(modulate(self.norm(a), scale, shift))
