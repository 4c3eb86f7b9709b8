"""Routes by language, on sentences as people write them: from their bytes to the draft that learns from them."""

from typing import Any

import pytest
import torch
from fakes import tiny_model
from routed import FAST, kept
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_osd
from hf_osd import OnlineAssistant
from hf_osd.routing import ByLanguage, Prompt

SENTENCES = {
    "en": [
        "The train to the coast leaves twice a day, and the last one is late.",
        "Could you tell me how long the soup has to cook?",
        "My neighbour's cat sleeps on our roof whenever it rains.",
    ],
    "de": [
        "Der Zug zur Küste fährt zweimal am Tag, und der letzte kommt zu spät.",
        "Können Sie mir sagen, wie lange die Suppe kochen muss?",
        "Die Katze meiner Nachbarin schläft auf unserem Dach, sobald es regnet.",
    ],
    "fr": [
        "Le train pour la côte part deux fois par jour, et le dernier est en retard.",
        "Pourriez-vous me dire combien de temps la soupe doit cuire ?",
        "Le chat de ma voisine dort sur notre toit dès qu'il pleut.",
    ],
    "es": [
        "El tren a la costa sale dos veces al día, y el último llega tarde.",
        "¿Podría decirme cuánto tiempo tiene que cocer la sopa?",
        "El gato de mi vecina duerme en nuestro tejado cada vez que llueve.",
    ],
    "zh": [
        "开往海边的火车每天两班,最后一班总是晚点。",
        "请问这道汤要煮多长时间?",
        "一下雨,邻居家的猫就睡在我们的屋顶上。",
    ],
}


def tokenizer_of_bytes() -> PreTrainedTokenizerFast:
    """A token for each byte, as in the tokenizers of GPT-2 and Llama 3, without merges."""
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def test_each_language_has_a_draft_that_learns_from_it() -> None:
    """Catches a router that sees padding, pieces of letters or its neighbour's row in place of a sentence."""
    pytest.importorskip("py3langid")
    tokenizer, options = tokenizer_of_bytes(), {"vocab_size": 258, "max_position_embeddings": 256}
    target: Any = tiny_model("llama", dtype=torch.float32, **options)
    draft: Any = tiny_model("llama", seed=5, layers=1, dtype=torch.float32, **options)
    router = ByLanguage(tokenizer, list(SENTENCES))
    with OnlineAssistant(drafts={"en": draft}, target=target, config=FAST, router=router) as assistant:
        for sentences in zip(*SENTENCES.values(), strict=True):  # one of each language
            inputs = tokenizer(list(sentences), return_tensors="pt", padding=True)
            inputs.pop("token_type_ids", None)
            settings: dict[str, Any] = {**inputs, "max_new_tokens": 8, "do_sample": False}
            found = hf_osd.generate(target, **settings, online_assistant=assistant)
            assert torch.equal(found, target.generate(**settings))
        learned = {
            name: [tokenizer.decode(one.prompt_ids) for one in kept(assistant, name)] for name in assistant.routes
        }
        stats = assistant.stats()
    assert learned == SENTENCES
    assert [one.requests for one in stats.routes.values()] == [3] * 5
    assert all(one.updates > 0 == one.failed_updates for one in stats.routes.values())


def test_a_system_prompt_has_no_language() -> None:
    """Catches questions that take the language of what stands before each of them, and prompts with no part left."""
    pytest.importorskip("py3langid")
    tokenizer, target = tokenizer_of_bytes(), tiny_model("llama")
    router = ByLanguage(tokenizer, list(SENTENCES))
    system = "You are a helpful assistant of the public library. Answer in one sentence, and stay polite. User: "

    def language(text: str) -> str:
        return router.choose(Prompt(torch.tensor(tokenizer(text)["input_ids"]), target), ["en"])

    assert language(system + SENTENCES["en"][0]) == "en"
    found = [[language(system + text) for text in texts] for texts in zip(*SENTENCES.values(), strict=True)]
    assert found == [list(SENTENCES)] * 3
    assert [language(SENTENCES["de"][0]) for _ in range(20)] == ["de"] * 20


def test_what_a_question_shares_with_others_still_tells_its_language() -> None:
    """Catches questions of one form that are cut down to a name, which may be of any language."""
    pytest.importorskip("py3langid")
    tokenizer, target = tokenizer_of_bytes(), tiny_model("llama", vocab_size=258)
    router = ByLanguage(tokenizer, list(SENTENCES))
    for country in ("Peru", "France", "Chad", "Norway"):
        ids = torch.tensor(tokenizer(f"What is the capital of {country}?")["input_ids"])
        assert router.choose(Prompt(ids, target), list(SENTENCES)) == "en"
