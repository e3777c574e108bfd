"""The shape of a parent that is not at hand (conf/shapes/NAME.yaml): what its config.json says, and where that was read."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from puzzle_dag.config.reading import Name, Settings, check_name, read_settings


class Shape(Settings):
    """A parent's configuration, for planning and measuring where its checkpoint can't be fetched."""

    version: Literal[1]
    """Version of this file format."""
    name: Name
    """The file's stem."""
    source: str = Field(min_length=1)
    """Where the numbers come from."""
    config: dict[str, Any]
    """Fields of the checkpoint's config.json, `model_type` among them."""


def read_shape(conf: Path, name: str) -> Shape:
    """Read conf/shapes/NAME.yaml. Raises ConfigError."""
    return read_settings(Shape, conf / "shapes" / f"{check_name(name)}.yaml")
