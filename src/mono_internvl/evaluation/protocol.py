"""How a benchmark is asked: all that an answer depends on besides model and question."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mono_internvl.compute import ComputePlan
from mono_internvl.errors import ConfigError
from mono_internvl.generation.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How further answers to a question are drawn.

    Attributes:
        temperature: Of the draws.
        top_p: Least share of probability to choose from; 1 for all.
        top_k: How many of the most likely tokens to choose from; 0 for all.
        greedy_first: Whether the first answer is the greedy one.

    Raises:
        ConfigError: A field is out of its range.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    greedy_first: bool = False

    def __post_init__(self) -> None:
        self.sampling(1, 1, 0)
        if self.temperature == 0:
            raise ConfigError("temperature=0; every draw would be the same, give more than 0")

    def sampling(self, draw: int, max_new_tokens: int, seed: int) -> Sampling:
        """How a draw is made.

        Args:
            draw: Its number, from 0.
            max_new_tokens: Longest answer.
            seed: Of this draw.
        """
        if self.greedy_first and draw == 0:
            return Sampling(max_new_tokens=max_new_tokens)
        return Sampling(
            self.temperature, self.top_p, self.top_k, max_new_tokens=max_new_tokens, seed=seed
        )


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Stored with every answer: figures of two protocols are not compared.

    Attributes:
        max_new_tokens: Longest answer.
        decoding: How a token is chosen.
        drawing: With decoding "sampled", how.
        prompt_suffix: What stands behind every question, such as a wish for short answers.
        max_tiles: Most tiles per image; None is the processor's own number.
        max_tiles_of_later_images: Of a question's images behind its first; None is `max_tiles`.
        frames: Of a video, at equal distances; None without videos, or with `fps`.
        fps: Frames a second of a video; None without.
        subtitles: Whether what is said while the frames are seen stands in the question; None does
            not.
        precision: "bf16", "fp32" or "int8"; "auto" until there is a compute plan.
        attention: Attention implementation; None until there is a compute plan.

    Raises:
        ConfigError: A field has no sensible value.
    """

    max_new_tokens: int = 96
    decoding: Literal["greedy", "sampled"] = "greedy"
    drawing: Drawing | None = None
    prompt_suffix: str = ""
    max_tiles: int | None = None
    max_tiles_of_later_images: int | None = None
    frames: int | None = None
    fps: float | None = None
    subtitles: bool | None = None
    precision: str = "auto"
    attention: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("max_tiles", self.max_tiles)):
            is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not is_number and (name, value) != ("max_tiles", None):
                raise ConfigError(f"{name}={value!r}; expected an integer >= 1")
        if self.decoding != ("greedy" if self.drawing is None else "sampled"):
            raise ConfigError(
                f"decoding={self.decoding!r}, drawing={self.drawing}; expected 'greedy', or "
                "'sampled' and how"
            )

    def changed(
        self, *, attention: str | None, max_tiles: int | None, precision: str = "auto"
    ) -> Protocol:
        """The protocol with what is given; None and "auto" leave a field as it is."""
        return dataclasses.replace(
            self,
            attention=attention or self.attention,
            max_tiles=max_tiles or self.max_tiles,
            precision=self.precision if precision == "auto" else precision,
        )

    def of_length(self, max_new_tokens: int | None) -> Protocol:
        """The protocol with another longest answer, if one is given."""
        most = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        return dataclasses.replace(self, max_new_tokens=most)

    def drawn(self, drawing: Drawing) -> Protocol:
        """The protocol by which several answers are drawn."""
        return dataclasses.replace(self, decoding="sampled", drawing=drawing)

    def planned(self, plan: ComputePlan) -> Protocol:
        """The protocol with the precision and attention of a plan.

        Raises:
            ConfigError: It asks for others.
        """
        for name, asked, open_value in (
            ("precision", self.precision, "auto"),
            ("attention", self.attention, None),
        ):
            if asked not in (open_value, getattr(plan, name)):
                raise ConfigError(
                    f"{name}={getattr(plan, name)!r}; the protocol asks for {asked!r}; compute "
                    "with that, or choose another protocol"
                )
        return dataclasses.replace(self, precision=plan.precision, attention=plan.attention)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for rows of predictions and results."""
        return dataclasses.asdict(self)

    def check_same(self, found: Mapping[str, Any] | None, where: str, next_step: str) -> None:
        """Refuse answers that were given under another protocol, or under one that nobody knows.

        Args:
            found: The protocol that they are stored with; None if they name none.
            where: File or folder, for the message.
            next_step: What to do instead.

        Raises:
            ConfigError: It is not this one.
        """
        if found is None:
            raise ConfigError(
                f"{where}: its answers do not say under which protocol they were given, so they "
                f"cannot stand beside others; {next_step}"
            )
        for name, value in self.to_dict().items():
            if found.get(name) != value:
                raise ConfigError(
                    f"{where}: answered with {name}={found.get(name)!r}, expected {value!r}; "
                    f"{next_step}"
                )
