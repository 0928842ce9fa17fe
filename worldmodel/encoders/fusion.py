"""Joins the tokens of every sense under presence masks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from worldmodel.contracts import Fused, SeeingTextEncoder, Senses, TextEncoder
from worldmodel.encoders.camera import CameraEncoder
from worldmodel.encoders.heads import CameraHead, QueryHead
from worldmodel.encoders.keypoints import KeypointHead
from worldmodel.encoders.proprio import ProprioEncoder
from worldmodel.encoders.rgb import ImageEncoder
from worldmodel.encoders.tactile import TactileEncoder
from worldmodel.encoders.trajectory import TrajectoryEncoder
from worldmodel.encoders.vision import VisionEncoder
from worldmodel.errors import ConfigError
from worldmodel.nn import FeedForward, attend

SENSES = ("rgb", "camera", "points", "touch", "proprio", "text")
GIVES = ("fused", "text", "both")


class FusionBlock(nn.Module):
    """Pre-norm transformer block under a presence mask."""

    def __init__(self, *, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_a, self.norm_f = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_forward = FeedForward(width=width, hidden=hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, W), mask (B, N)."""
        q, k, v = self.qkv(self.norm_a(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(attend(q, k, v, mask[:, None, None]).flatten(-2))
        return x + self.feed_forward(self.norm_f(x))


class FusionEncoder(nn.Module):
    """Stage 1: one encoder per sense, a learned register that is always present, and a transformer over all tokens.

    Low-dimensional senses enter with their newest `frames` history frames; older ones reach the model through stage 2.
    `gives` is what the other stages read: the `fused` tokens, those of the text encoder as it leaves them (`text`:
    what the published transformers were trained on), or `both`.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        hidden: int,
        layers: int,
        frames: int,
        image: ImageEncoder | VisionEncoder,
        text: TextEncoder,
        camera: CameraEncoder,
        trajectory: TrajectoryEncoder,
        tactile: TactileEncoder,
        proprio: ProprioEncoder,
        camera_head: CameraHead,
        points_head: QueryHead | KeypointHead,
        force_head: QueryHead,
        gives: str = "fused",
    ) -> None:
        super().__init__()
        if gives not in GIVES:
            raise ConfigError(f"encoders.gives: unknown {gives!r}; one of {', '.join(GIVES)}")
        self.frames, self.gives = frames, gives
        self.image, self.text, self.camera = image, text, camera
        self.trajectory, self.tactile, self.proprio = trajectory, tactile, proprio
        self.camera_head, self.points_head, self.force_head = camera_head, points_head, force_head
        self.kind = nn.ParameterDict({name: nn.Parameter(torch.randn(width) * 0.02) for name in SENSES})
        self.register = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.view = nn.Parameter(torch.randn(camera.slot.shape[1], 1, width) * 0.02)
        self.blocks = nn.ModuleList(FusionBlock(width=width, heads=heads, hidden=hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def image_tokens(self, rgb: Tensor) -> Tensor:
        """Newest images (B, V, 3, h, w) -> tokens (B, V, cells, W) that know nothing but the image and its view."""
        return self.image(rgb) + self.view

    def words(self, s: Senses) -> tuple[Tensor, Tensor, Tensor]:
        """The instruction alone: tokens (B, M, W), presence (B, M), mean of the present ones (B, W); zero if absent."""
        tokens, mask = self.text(s.text)
        tokens, mask = tokens * s.has_text[:, None, None], mask & s.has_text.unsqueeze(-1)
        weight = mask.unsqueeze(-1).to(tokens.dtype)
        return tokens, mask, (tokens * weight).sum(1) / weight.sum(1).clamp(min=1.0)

    def read_text(self, s: Senses) -> tuple[Tensor, Tensor, Tensor]:
        """As `words`, but the tokens are those of images and instruction together where the text encoder sees.

        The mean stays that of the instruction alone, since the state policy learns without pictures.
        """
        tokens, mask, mean = self.words(s)
        if isinstance(self.text, SeeingTextEncoder):
            tokens, mask = self.text.see(s.text, s.has_text, s.rgb, s.has_rgb)
            tokens = tokens * mask.unsqueeze(-1)
        return tokens, mask, mean

    def instruction(self, s: Senses) -> Tensor:
        """The instruction alone, (B, W), zero where absent."""
        return self.words(s)[2]

    def context(self, s: Senses, fused: Fused | None) -> Fused:
        """What the other stages read by cross-attention; only where it gives the text alone it needs no `fused`."""
        if fused is None:
            text, mask, mean = self.read_text(s)
            return Fused(text, mask, mean, text, mask)
        tokens = {"fused": [fused.tokens], "text": [fused.text], "both": [fused.tokens, fused.text]}[self.gives]
        masks = {"fused": [fused.mask], "text": [fused.text_mask], "both": [fused.mask, fused.text_mask]}[self.gives]
        return fused._replace(tokens=torch.cat(tokens, 1), mask=torch.cat(masks, 1))

    @property
    def locates_alone(self) -> bool:
        """Whether points are read by a head of their own, which is told no points, rather than out of all senses."""
        return isinstance(self.points_head, KeypointHead)

    def locate(self, s: Senses, fused: Fused | None = None, *, images: bool = True) -> Tensor:
        """Where the tracked points are believed to be, standardised (B, K, 3).

        `fused` may be handed in when computed, and `images` says whether they were and are looked at.
        """
        if isinstance(self.points_head, KeypointHead):
            return self.points_head(s, self.instruction(s) if fused is None else fused.instruction, images)
        return self.points_head(self(s, SENSES if images else SENSES[1:]) if fused is None else fused)

    def forward(self, s: Senses, senses: Sequence[str] = SENSES, image_tokens: Tensor | None = None) -> Fused:
        """Fuses the senses named in `senses`; others cost nothing. `image_tokens` may be handed in when computed."""
        n, (text, text_mask, instruction) = self.frames, self.read_text(s)
        parts = [self.register.expand(s.text.shape[0], -1, -1)]
        masks = [s.has_text.new_ones(s.text.shape[0], 1)]

        def add(name: str, tokens: Tensor, mask: Tensor) -> None:
            if name in senses:
                parts.append(tokens + self.kind[name])
                masks.append(mask)

        if "rgb" in senses:
            images = self.image_tokens(s.rgb) if image_tokens is None else image_tokens
            images = images + self.camera.ray_features(s.rays[:, -1], s.has_camera)
            add("rgb", images.flatten(1, 2), s.has_rgb.repeat_interleave(images.shape[2], dim=1))
        if "camera" in senses:
            add("camera", self.camera(s.camera[:, -n:]).flatten(1, 2), s.has_camera.repeat(1, n))
        if "points" in senses:
            tokens = self.trajectory(s.points, s.visible, s.effector, s.has_proprio)[:, -n:]
            add("points", tokens.flatten(1, 2), s.has_points.repeat(1, n))
        if "touch" in senses:
            tokens = self.tactile(s.force[:, -n:], s.taxels[:, -n:], s.has_wrench, s.has_taxels)
            add("touch", tokens.flatten(1, 2), (s.has_wrench | s.has_taxels).repeat(1, n))
        if "proprio" in senses:
            add("proprio", self.proprio(s.proprio[:, -n:], s.embodiment), s.has_proprio[:, None].expand(-1, n))
        if "text" in senses:
            add("text", text, text_mask)
        x, mask = torch.cat(parts, 1), torch.cat(masks, 1)
        for block in self.blocks:
            x = block(x, mask)
        return Fused(self.norm(x), mask, instruction, text, text_mask)
