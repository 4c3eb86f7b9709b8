"""`Tokenizers`: those of a target and its drafts, as far as they are known, and how each draft reads the target's."""

from collections.abc import Mapping
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .config import reason_of
from .drafts.compatibility import have_one_size, translation_for, vocabulary_sizes
from .drafts.translation import Translation
from .errors import InputError

logger = logging.get_logger(__name__)

GivenTokenizers = PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None
"""One of all drafts, or one for each route."""

_FILE = "tokenizer_config.json"  # that every saved tokenizer has
_OF_TARGET = "target_tokenizer"  # folder of a saved assistant


class Tokenizers:
    """
    The tokenizers of a target and its drafts. Two of them are compared once, however many drafts have them.

    Args:
        target (`PreTrainedModel`): The target.
        drafts (`Mapping[str, PreTrainedModel]`): Drafts by route.
        of_target (`PreTrainedTokenizerBase`, *optional*): That of the target.
        of_drafts (`PreTrainedTokenizerBase` or `Mapping[str, PreTrainedTokenizerBase]`, *optional*):
            That of the drafts, or of each route. One that is given for several drafts is not that of those whose
            vocabulary has the size of the target's: these are of the target's family.

    Raises:
        InputError: A tokenizer is given for a route that has no draft.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafts: Mapping[str, PreTrainedModel],
        of_target: PreTrainedTokenizerBase | None = None,
        of_drafts: GivenTokenizers = None,
    ) -> None:
        if isinstance(of_drafts, Mapping):
            given = dict(of_drafts)
        else:
            others = [name for name, draft in drafts.items() if len(drafts) == 1 or not have_one_size(target, draft)]
            given = dict.fromkeys(others, of_drafts) if of_drafts is not None else {}
        if unknown := sorted(given.keys() - drafts.keys()):
            raise InputError(f"tokenizer has one for route {unknown[0]!r}, which has no draft: {sorted(drafts)} have")
        self._of_target, self._by_route = of_target, given
        self._loaded: dict[str | None, PreTrainedTokenizerBase | None] = {}  # by where they came from
        self._compared: dict[tuple[object, ...], Translation | None] = {}

    def of(self, route: str, draft: PreTrainedModel, target: PreTrainedModel) -> PreTrainedTokenizerBase | None:
        """
        Return the tokenizer of a draft, where it is known.

        One that was not given is loaded where the sizes of the vocabularies show that it is another one.
        """
        if not have_one_size(target, draft):
            if self._of_target is None:
                self._of_target = self._load(target.name_or_path)
            if route not in self._by_route and (found := self._load(draft.name_or_path)) is not None:
                self._by_route[route] = found
        return self._by_route.get(route)

    def _load(self, source: str | None) -> PreTrainedTokenizerBase | None:
        if source not in self._loaded:
            self._loaded[source] = load_tokenizer(source)
        return self._loaded[source]

    def fork(self, route: str, like: str) -> None:
        """Say that the draft of a new route has the tokenizer of another one."""
        if like in self._by_route:
            self._by_route[route] = self._by_route[like]

    def translation(self, route: str, draft: PreTrainedModel, target: PreTrainedModel) -> Translation | None:
        """Return how a draft reads its target's tokens; see [`~hf_osd.drafts.compatibility.translation_for`]."""
        own = self.of(route, draft, target)
        key = (id(own), type(draft), *vocabulary_sizes(target, draft))  # tokenizers are kept, so numbers stay theirs
        if key not in self._compared:
            self._compared[key] = translation_for(target, draft, self._of_target, own)
        return self._compared[key]

    def save(self, state: Path) -> None:
        """Keep the tokenizer of the target beside a saved draft, for a target that came from nowhere."""
        if self._of_target is not None:
            self._of_target.save_pretrained(state / _OF_TARGET)


def tokenizer_of_target(target: PreTrainedModel, state: Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a target from where it came from, or else what [`Tokenizers.save`] has kept."""
    found = load_tokenizer(target.config._name_or_path)
    return found if found is not None else saved_tokenizers({"": state / _OF_TARGET}).get("")


def saved_tokenizers(folders: Mapping[str, str | Path]) -> dict[str, PreTrainedTokenizerBase]:
    """Load the tokenizers that were saved in folders, where there are any."""
    found = {name: load_tokenizer(str(folder)) for name, folder in folders.items() if (Path(folder) / _FILE).is_file()}
    return {name: one for name, one in found.items() if one is not None}


def load_tokenizer(source: str | None) -> PreTrainedTokenizerBase | None:
    """Load a tokenizer, or warn where there is none: tokenizers only help to refuse a wrong pair early."""
    try:
        return AutoTokenizer.from_pretrained(source) if source else None
    except (OSError, ValueError) as error:
        logger.warning(
            "No tokenizer can be loaded from %s, so nothing checks that draft and target share one: %s",
            source,
            reason_of(error),
        )
        return None
