"""Configuration of channel-merged causal language models."""

import operator
from itertools import pairwise
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .chat_turns import ChatTurns

# Version 1 may leave out `router.features`: its first routers, which named none, read the trunk alone.
FORMAT_VERSION = 2

AUTO_MAP = {
    "AutoConfig": "configuration_channel_merged.ChannelMergedConfig",
    "AutoModel": "modeling_channel_merged.ChannelMergedModel",
    "AutoModelForCausalLM": "modeling_channel_merged.ChannelMergedForCausalLM",
}

MAX_LAYERS = 1024  # far beyond any model, far below what would take for ever to build
NGRAM_BUCKETS = 1 << 15  # of routers whose config names no other number
MAX_EXPERTS = 62  # the owners of a row are bits of an int64
POOLINGS = ("mean", "last")
# Which outputs a pass has: the base architecture looks into its own config, tools into that of the whole.
SHARED_OUTPUTS = ("output_hidden_states", "output_attentions")
ROUTER_FEATURES = ("words", "trunk_and_words", "trunk_and_ngrams", "trunk")
FALLBACKS = ("doubt", "likely")
MAX_BUCKETS = (1 << 24) - 1
CONTEXTS = ("last_user_turn", "conversation")


class ChannelMergedConfig(PreTrainedConfig):
    """Configuration of `ChannelMergedForCausalLM`: N experts of one base architecture in one checkpoint.

    Args:
        text_config: configuration of the base architecture, a `PreTrainedConfig` or its dict.
        expert_names: names of the N experts, in the order of their index.
        rows: stored rows R of every channel-merged module, by its path in the base architecture. A path that is left
            out has as many rows as channels (all experts share them).
        router: `layers` (decoder blocks that the router's features pass through, at least 1), `pooling` ("mean" over
            the attention mask or "last" token), `features` ("words" reads the query's token ids alone and runs no
            block, "trunk" the blocks' features alone, "trunk_and_words" and "trunk_and_ngrams", which knows no words,
            both), `ngram_buckets` (rows of the table of n-grams), `vocabulary` (token ids whose words are known),
            `temperature` (probabilities are those of the logits divided by it), `trunk_expert` (the expert whose
            weights make the features),
            `default_expert` (answers while the router is untrained, or in doubt), `threshold` (probability in [0, 1];
            0 always follows the router) and `fallback`: the default expert answers where the router is less sure than
            the threshold ("doubt"), or where it is itself more probable than 1 - threshold ("likely"; the same for two
            experts); `min_known` (it also answers a query of whose n-grams the router knows a smaller share),
            `max_tokens` (the router reads the first and the last half of so many tokens of a longer query), `context`
            (what it reads of a conversation: "last_user_turn" or "conversation", all turns of the user; never system
            prompts or answers), `turns` (by what it finds them in a prompt's token ids, see `ChatTurns`; None: it
            reads all of a prompt).
        expert_vocabularies: every expert's own vocabulary by its name, where it is whole: `size` ids, which are the
            merged vocabulary's ids in `runs` of [first id, length], and its own `bos_token_id`, `eos_token_id` and
            `pad_token_id`. An export restores it.
        expert_eos_token_ids: tokens that end an expert's answer, by its name; None where all have
            `generation_config.eos_token_id`.
        pinned_expert: the expert that answers wherever a call names none, instead of the router; None: the router's
            choice. It is saved with the config; `from_pretrained(..., expert=NAME)` pins one for one loaded model.
        merge: how the checkpoint was made (recipe, revisions, method, seed, versions); only kept, never read.
        format_version: version of the stored form; an older one is read as what it meant, and saved as the newest.
    """

    model_type = "channel_merged"
    keys_to_ignore_at_inference = ["past_key_values", "expert_index"]
    sub_configs = {"text_config": AutoConfig}

    text_config: dict | PreTrainedConfig | None = None
    expert_names: list[str] | None = None
    num_experts: int | None = None
    rows: dict[str, int] | None = None
    router: dict[str, Any] | None = None
    expert_vocabularies: dict[str, dict[str, Any]] | None = None
    expert_eos_token_ids: dict[str, list[int]] | None = None
    pinned_expert: str | None = None
    merge: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        text_config = self.text_config if isinstance(self.text_config, dict) else vars(self.text_config or self)
        layers = text_config.get("num_hidden_layers") or 0
        if isinstance(layers, int) and layers > MAX_LAYERS:  # before as many are listed
            raise ValueError(f"text_config.num_hidden_layers is {layers}, expected at most {MAX_LAYERS}")
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **(self.text_config or {})})
        use_cache = kwargs.get("use_cache")  # which Transformers takes for a parameter of generation, and drops
        self.__dict__["_building"] = True  # Transformers would take the base's rope parameters for the whole's own
        super().__post_init__(**kwargs)
        del self.__dict__["_building"]
        if use_cache is not None:
            self.use_cache = use_cache
        for name in SHARED_OUTPUTS:
            if getattr(self, name) or getattr(self.text_config, name):
                setattr(self, name, True)
        if type(self.format_version) is not int or not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version is {self.format_version!r}, but this code reads versions 1 to {FORMAT_VERSION}: "
                "load it with the checkpoint's own code files (trust_remote_code=True) or update channel-merged"
            )
        features = "trunk" if self.format_version == 1 else "trunk_and_ngrams"
        self.format_version = FORMAT_VERSION
        if isinstance(self.num_experts, int) and self.num_experts > MAX_EXPERTS:  # before as many names are made
            raise ValueError(f"num_experts is {self.num_experts}, expected at most {MAX_EXPERTS}")
        if self.expert_names is None:
            self.expert_names = [f"expert_{expert}" for expert in range(self.num_experts or 2)]
        if self.num_experts is None:
            self.num_experts = len(self.expert_names)
        for key in ("rows", "router", "expert_vocabularies", "merge"):
            if not isinstance(getattr(self, key) or {}, dict):
                raise ValueError(f"{key} is {getattr(self, key)!r:.50}, expected names and values")
        self.rows = dict(self.rows or {})
        self.router = {
            "layers": max(1, self.text_config.num_hidden_layers // 10),
            "pooling": "mean",
            "features": features,
            "ngram_buckets": NGRAM_BUCKETS,
            "vocabulary": 0,
            "temperature": 1.0,
            "trunk_expert": self.expert_names[0],
            "default_expert": self.expert_names[0],
            "threshold": 0.0,
            "fallback": "doubt",
            "min_known": 0.0,
            "max_tokens": min(256, getattr(self.text_config, "max_position_embeddings", None) or 256),
            "context": "last_user_turn",
            "turns": None,
            **(self.router or {}),
        }
        self.expert_vocabularies = dict(self.expert_vocabularies or {})
        self.merge = dict(self.merge or {})
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.auto_map = dict(AUTO_MAP)
        # Filled in only where missing, so that `config.pad_token_id` and the like answer as the base's config does.
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, token, None) is None:
                setattr(self, token, getattr(self.text_config, token, None))
        self.validate_architecture()

    def validate_architecture(self):
        """Raise ValueError with the field, its value and what was expected."""
        names = self.expert_names
        if len(names) != self.num_experts:
            raise ValueError(f"num_experts is {self.num_experts}, but expert_names has {len(names)}: {names}")
        if len(set(names)) != len(names):
            raise ValueError(f"expert_names must differ from each other, got {names}")
        for key in ("trunk_expert", "default_expert"):
            if self.router[key] not in names:
                raise ValueError(f"router.{key} is {self.router[key]!r}, expected one of {names}")
        if self.pinned_expert is not None and self.pinned_expert not in names:
            raise ValueError(f"pinned_expert is {self.pinned_expert!r}, expected one of {names}")
        for path, num_rows in self.rows.items():
            if type(num_rows) is not int or num_rows < 1:
                raise ValueError(f"rows[{path!r}] is {num_rows!r}, expected a number of rows")
        num_layers = self.text_config.num_hidden_layers
        if type(self.router["layers"]) is not int or not 1 <= self.router["layers"] <= num_layers:
            raise ValueError(
                f"router.layers is {self.router['layers']!r}, expected 1 to {num_layers} (num_hidden_layers)"
            )
        if self.router["pooling"] not in POOLINGS:
            raise ValueError(f"router.pooling is {self.router['pooling']!r}, expected one of {POOLINGS}")
        if self.router["features"] not in ROUTER_FEATURES:
            raise ValueError(f"router.features is {self.router['features']!r}, expected one of {ROUTER_FEATURES}")
        if self.router["fallback"] not in FALLBACKS:
            raise ValueError(f"router.fallback is {self.router['fallback']!r}, expected one of {FALLBACKS}")
        for key, least, most in (("ngram_buckets", 1, MAX_BUCKETS), ("vocabulary", 0, MAX_BUCKETS)):
            if type(number := self.router[key]) is not int or not least <= number <= most:
                raise ValueError(f"router.{key} is {number!r}, expected {least} to {most}")
        if not (isinstance(self.router["temperature"], int | float) and 0 < self.router["temperature"] < float("inf")):
            raise ValueError(f"router.temperature is {self.router['temperature']!r}, expected a number above 0")
        for name, vocabulary in self.expert_vocabularies.items():
            end = max((first + length for first, length in vocabulary["runs"]), default=0)
            size = sum(length for _, length in vocabulary["runs"])
            # Ids are read as many as `size` says, so the runs must not overlap.
            runs = sorted(vocabulary["runs"])
            apart = all(first + length <= after for (first, length), (after, _) in pairwise(runs))
            apart = apart and all(first >= 0 and length > 0 for first, length in runs)
            if name not in names or size != vocabulary["size"] or end > self.vocab_size or not apart:
                raise ValueError(
                    f"expert_vocabularies[{name!r}] has {size} of {vocabulary['size']} ids below {end}, expected an "
                    f"expert of {names} and ids of the merged vocabulary of {self.vocab_size}, each in one run"
                )
        ends = self.expert_eos_token_ids or {}
        if not isinstance(ends, dict) or any(
            not isinstance(tokens, list) or any(type(token) is not int for token in tokens) for tokens in ends.values()
        ):
            raise ValueError(f"expert_eos_token_ids is {ends!r:.100}, expected a list of token ids for each expert")
        if self.expert_eos_token_ids is not None and set(self.expert_eos_token_ids) != set(names):
            raise ValueError(f"expert_eos_token_ids is of {sorted(self.expert_eos_token_ids)}, expected of {names}")
        for key, what in (("threshold", "a probability"), ("min_known", "a share")):
            if not (isinstance(value := self.router[key], int | float) and 0 <= value <= 1):
                raise ValueError(f"router.{key} is {value!r}, expected {what} in [0, 1]")
        if not isinstance(max_tokens := self.router["max_tokens"], int) or max_tokens < 1:
            raise ValueError(f"router.max_tokens is {max_tokens!r}, expected a number of at least 1")
        if self.router["context"] not in CONTEXTS:
            raise ValueError(f"router.context is {self.router['context']!r}, expected one of {CONTEXTS}")
        if self.router["turns"] is not None:
            try:
                ChatTurns.from_dict(self.router["turns"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"router.turns are no markers of chat templates: {error}") from None

    def __getattr__(self, name: str):
        """What the base architecture's config alone knows (`hidden_size`, `use_cache`, ...) is read from there."""
        text_config = self.__dict__.get("text_config")
        if name.startswith("_") or "_building" in self.__dict__ or not hasattr(text_config, name):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        return getattr(text_config, name)

    def __setattr__(self, name: str, value):
        """... and written there; what both have and a pass of the model reads is written to both."""
        text_config = self.__dict__.get("text_config")
        is_of_base = isinstance(text_config, PreTrainedConfig) and hasattr(text_config, name)
        if not is_of_base or hasattr(type(self), name) or name in self.__dict__ or name.startswith("_"):
            super().__setattr__(name, value)
            if not is_of_base or name not in SHARED_OUTPUTS:
                return
        setattr(text_config, name, value)

    def vocabulary_channels(self, expert: str | int) -> list[int] | None:
        """The merged vocabulary's id of each of an expert's own ids; None where its own vocabulary is not known."""
        vocabulary = self.expert_vocabularies.get(self.expert_names[self.expert_id(expert)])
        if vocabulary is None:
            return None
        return [number for first, length in vocabulary["runs"] for number in range(first, first + length)]

    def resize_vocabulary(self, size: int):
        """Change the merged vocabulary's size; ids that are new belong to every expert, behind its own ones."""
        added = size - self.vocab_size
        for name, vocabulary in list(self.expert_vocabularies.items()):
            if added > 0:
                runs = [*vocabulary["runs"], [self.vocab_size, added]]
                self.expert_vocabularies[name] = {**vocabulary, "size": vocabulary["size"] + added, "runs": runs}
            elif any(first + length > size for first, length in vocabulary["runs"]):
                del self.expert_vocabularies[name]
        self.vocab_size = size

    def expert_id(self, expert: str | int) -> int:
        """Index of an expert given by name or index; ValueError with the known names otherwise."""
        if isinstance(expert, str):
            if expert not in self.expert_names:
                raise ValueError(f"unknown expert {expert!r}: this model has {self.expert_names}")
            return self.expert_names.index(expert)
        try:
            number = None if isinstance(expert, bool) else operator.index(expert)
        except TypeError:
            number = None
        if number is None:
            raise ValueError(
                f"expert {expert!r} is neither a name nor an index: this model has {self.expert_names}, 0 to "
                f"{self.num_experts - 1}"
            )
        if not 0 <= number < self.num_experts:
            raise ValueError(f"expert index {number} is out of range: this model has {self.num_experts} experts")
        return list(range(self.num_experts))[number]  # a constant also where torch.compile made `expert` a symbol


__all__ = ["ChannelMergedConfig"]
