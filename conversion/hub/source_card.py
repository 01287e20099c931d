"""What the model card of somebody else's model says of its licence and its languages."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from conversion.io.model_files import CARD_FILE
from conversion.io.wording import one_line

logger = logging.getLogger(__name__)

NOT_STATED = "not stated"


@dataclass(frozen=True)
class SourceCard:
    """Licence and languages of the base or of an expert."""

    license: str | None = None
    license_name: str | None = None  # of a licence that the Hub only knows as "other"
    license_link: str | None = None
    languages: tuple[str, ...] = ()

    @property
    def license_text(self) -> str:
        """The licence for a reader, with its link if it has one."""
        name = self.license_name or self.license or NOT_STATED
        is_address = (self.license_link or "").startswith(("https://", "http://"))
        return f"[{name}]({self.license_link})" if is_address else name

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "languages": list(self.languages)}


def read_card(name: str, folder: Path) -> SourceCard:
    """Licence and languages from the README.md of a checkpoint; nothing where there is none that can be read."""
    file = folder / CARD_FILE
    if not file.is_file():
        return SourceCard()
    try:
        metadata = metadata_load(file) or {}
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("%s: the metadata of %s cannot be read: %s", name, file, one_line(error))
        return SourceCard()
    licenses = [str(value) for value in _listed(metadata.get("license"))]
    return SourceCard(
        license=" and ".join(licenses) or None,
        license_name=_text(metadata.get("license_name")),
        license_link=_text(metadata.get("license_link")),
        # Unquoted, the code of Norwegian is YAML's word for false.
        languages=tuple("no" if value is False else str(value) for value in _listed(metadata.get("language"))),
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _listed(value: Any) -> list[Any]:
    """A value of the metadata that may be one or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
