"""How a benchmark is asked: all that an answer depends on besides model and question."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mono_internvl.compute import ComputePlan
from mono_internvl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Stored with every answer: figures of two protocols are not compared.

    Attributes:
        max_new_tokens: Longest answer.
        decoding: How a token is chosen.
        prompt_suffix: What stands behind every question, such as a wish for short answers.
        max_tiles: Most tiles per image; None is the processor's own number.
        max_tiles_of_later_images: Of a question's images behind its first; None is `max_tiles`.
        precision: "bf16", "fp32" or "int8"; "auto" until there is a compute plan.
        attention: Attention implementation; None until there is a compute plan.

    Raises:
        ConfigError: A field has no sensible value.
    """

    max_new_tokens: int = 96
    decoding: Literal["greedy"] = "greedy"
    prompt_suffix: str = ""
    max_tiles: int | None = None
    max_tiles_of_later_images: int | None = None
    precision: str = "auto"
    attention: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("max_tiles", self.max_tiles)):
            is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not is_number and (name, value) != ("max_tiles", None):
                raise ConfigError(f"{name}={value!r}; expected an integer >= 1")
        if self.decoding != "greedy":
            raise ConfigError(f"decoding={self.decoding!r}; expected 'greedy'")

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
