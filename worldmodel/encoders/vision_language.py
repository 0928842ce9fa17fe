"""The newest images and the instruction together through a vision-language model of Qwen's kind"""

from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from worldmodel.encoders.conditioner import Conditioner, refuse_graphs, sentence, stack
from worldmodel.encoders.feature_store import key_of, pixels_of
from worldmodel.encoders.vision import Resize, normalisation
from worldmodel.errors import ConfigError


class Scene(NamedTuple):
    """What one row of a batch shows and says."""

    images: list[int]  # views that are there
    words: str | None


class VisionLanguageConditioner(Conditioner):
    """A conditioner that also sees: images first, then the instruction, and the last hidden states of both.

    Only what is there enters the sequence: an absent view or instruction leaves no token. Called with a text alone it
    answers for the instruction alone, as `Conditioner` does. Without a path the configuration must have the numbers of
    the image tokens, above those of bytes.

    Args:
        width, path, config, length, system, skip, frozen: see `Conditioner`; `length` counts tokens of words.
        size: rows and columns of the pictures as the data have them.
        pixels: rows and columns of the pictures as the model gets them.
        cameras: names of the views, in their order.
        views: names of the cameras it sees; null is all of them.
    """

    def __init__(
        self,
        *,
        width: int,
        path: str | None,
        config: Mapping[str, Any],
        size: tuple[int, int],
        pixels: tuple[int, int],
        cameras: Sequence[str],
        views: Sequence[str] | None = None,
        length: int = 1024,
        system: str = "",
        skip: int = 0,
        frozen: bool = True,
    ) -> None:
        super().__init__(width=width, path=path, config=config, length=length, system=system, skip=skip, frozen=frozen)
        if unknown := [name for name in views or () if name not in cameras]:
            raise ConfigError(f"encoders.text.views: no camera {unknown[0]!r}; the data have {', '.join(cameras)}")
        self.views = [i for i, name in enumerate(cameras) if views is None or name in views]
        own, seeing = self.net.config, getattr(self.net.config, "vision_config", None)
        parts = ("patch_size", "spatial_merge_size", "temporal_patch_size")
        if not all(hasattr(seeing, name) for name in parts) or not hasattr(own, "vision_start_token_id"):
            raise ConfigError(
                f"encoders.text.{'config' if path is None else f'path: {path}'} is a {own.model_type}; those that read "
                "images as Qwen-VL does are qwen2_vl, qwen2_5_vl, qwen3_vl and qwen3_5"
            )
        self.patch, self.merge, self.repeats = (int(getattr(seeing, name)) for name in parts)
        self.pixels = (pixels[0], pixels[1])
        if any(side % (self.patch * self.merge) for side in self.pixels):
            raise ConfigError(
                f"encoders.text.pixels: {self.pixels} is no multiple of {self.patch * self.merge}, the patches of "
                f"{self.patch} pixels that {own.model_type} merges by {self.merge} × {self.merge}"
            )
        self.grid = (self.pixels[0] // self.patch, self.pixels[1] // self.patch)
        self.mean, self.std = normalisation(self.option, path)
        self.resize = Resize(size=(size[0], size[1]), pixels=self.pixels, mean=self.mean, std=self.std)

    def settings(self) -> dict[str, Any]:
        """What features depend on beside the weights."""
        return {**super().settings(), "pixels": self.pixels, "mean": self.mean, "std": self.std}

    def see(self, text: Tensor, has_text: Tensor, rgb: Tensor, has_rgb: Tensor) -> tuple[Tensor, Tensor]:
        """text (B, L), has_text (B,), rgb (B, V, 3, h, w) in [-1, 1], has_rgb (B, V) -> states (B, M, W), presence.

        A row in which nothing is there has no token. Raises `ExportError` when traced.
        """
        refuse_graphs()
        scenes = self.scenes(text, has_text, has_rgb)
        looking = [i for i, scene in enumerate(scenes) if scene.images]
        keys = [] if self.store is None else self.keys([scenes[i] for i in looking], rgb[looking])

        def compute(places: list[int]) -> Sequence[Tensor]:
            rows = [looking[place] for place in places]
            return self.look([scenes[i] for i in rows], rgb[rows])

        seen = dict(zip(looking, self.recall(keys or [0] * len(looking), rgb.device, compute), strict=True))
        rows = [seen[i] if i in seen else self.encode(scene.words or "", rgb.device) for i, scene in enumerate(scenes)]
        tokens, mask = stack(rows)
        there = torch.tensor([bool(scene.images) or scene.words is not None for scene in scenes], device=rgb.device)
        return tokens, mask & there.unsqueeze(-1)

    def examples(
        self, text: Tensor, has_text: Tensor, rgb: Tensor, has_rgb: Tensor, *, known: Container[int], silent: bool
    ) -> dict[int, Tensor]:
        """Hidden states of images and instruction, of the instruction alone and, if `silent`, of images alone."""
        found = super().examples(text, has_text, rgb, has_rgb, known=known, silent=silent)
        for said in (has_text, torch.zeros_like(has_text)) if silent else (has_text,):
            scenes = self.scenes(text, said, has_rgb)
            new = {
                key: i
                for i, key in enumerate(self.keys(scenes, rgb))
                if scenes[i].images and key not in known and key not in found
            }
            rows = list(new.values())
            found |= zip(new, self.look([scenes[i] for i in rows], rgb[rows]), strict=True) if rows else ()
        return found

    def scenes(self, text: Tensor, has_text: Tensor, has_rgb: Tensor) -> list[Scene]:
        """What each row shows and says."""
        rows = zip(text.cpu(), has_text.tolist(), has_rgb.tolist(), strict=True)
        return [Scene([v for v in self.views if there[v]], sentence(t) if said else None) for t, said, there in rows]

    def keys(self, scenes: Sequence[Scene], rgb: Tensor) -> list[int]:
        """What the features of scenes are stored under; rgb (B, V, 3, h, w)."""
        pixels = [pixels_of(views) for views in rgb]
        said = [b"" if scene.words is None else b"+" + scene.words.encode() for scene in scenes]
        return [key_of(said[i], *(pixels[i][v] for v in scene.images)) for i, scene in enumerate(scenes)]

    def look(self, scenes: Sequence[Scene], rgb: Tensor) -> list[Tensor]:
        """The network itself on scenes with images, padded on the right; its answer has its own precision."""
        device, own = rgb.device, self.net.config
        count = self.grid[0] * self.grid[1] // self.merge**2
        sequences = [torch.tensor(self.prompt(scene, count), device=device) for scene in scenes]
        ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        sizes = torch.tensor([len(ids) for ids in sequences], device=device)
        present = torch.arange(ids.shape[1], device=device) < sizes.unsqueeze(-1)
        images = torch.cat([rgb[i, scene.images] for i, scene in enumerate(scenes)])
        gradients, precision = self.running(device)
        with gradients, precision:
            hidden = self.net(
                input_ids=ids,
                attention_mask=present.long(),
                mm_token_type_ids=((ids == own.image_token_id) & present).long(),
                pixel_values=self.patches(self.resize(images)).to(self.net.dtype),
                image_grid_thw=torch.tensor([[1, *self.grid]], device=device).expand(len(images), 3),
            ).last_hidden_state
            return [self.told(row[:size]) for row, size in zip(hidden, sizes.tolist(), strict=True)]

    def prompt(self, scene: Scene, count: int) -> list[int]:
        """Numbers of the tokens of a scene: `count` for every image, between marks, then the words."""
        own, words = self.net.config, scene.words or ""
        image = [own.image_token_id] * count
        if self.tokeniser is None or self.tokeniser.chat_template is None:
            marked = [own.vision_start_token_id, *image, own.vision_end_token_id]
            return marked * len(scene.images) + (self.tokens(words)[: self.length] if words else [])
        content = [{"type": "image"} for _ in scene.images]
        content += [{"type": "text", "text": words}] if words else []
        ids = self.tokeniser(self.chat(content))["input_ids"][: self.length]
        if ids.count(own.image_token_id) != len(scene.images):
            raise ConfigError(
                f"encoders.text.path: the chat template in {self.path} puts {ids.count(own.image_token_id)} image "
                f"tokens for {len(scene.images)} images; that of a vision-language model puts one for each"
            )
        return [token for one in ids for token in (image if one == own.image_token_id else [one])]

    def patches(self, x: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) -> rows of patches, merged ones together, each repeated as two frames of a film."""
        n, c = x.shape[:2]
        (rows, columns), m, p = self.grid, self.merge, self.patch
        x = x.reshape(n, c, rows // m, m, p, columns // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
        return x.unsqueeze(6).expand(*x.shape[:6], self.repeats, p, p).reshape(n * rows * columns, -1)
