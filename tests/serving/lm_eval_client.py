"""What lm-eval gets of a server, as JSON on standard output; run by `test_clients` with a Python
that has it: lm_eval_client.py URL MODEL < {"pairs": [[context, continuation]], "prompts": [...]}"""

from __future__ import annotations

import json
import sys

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.models.openai_completions import (  # pyright: ignore[reportMissingImports]
    LocalChatCompletion,
    LocalCompletionsAPI,
)


def main(url: str, model: str) -> None:
    asked = json.load(sys.stdin)
    told = {}
    pairs = [Instance("loglikelihood", {}, tuple(pair), 0) for pair in asked["pairs"]]
    until = {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0}
    common = {"model": model, "max_length": 512, "max_retries": 1}
    for name, more in {"one": {"batch_size": 4}, "many": {"num_concurrent": 4}}.items():
        lm = LocalCompletionsAPI(base_url=f"{url}/v1/completions", **common, **more)
        assert lm.tokenizer_backend == "remote"
        told[f"loglikelihood_{name}"] = lm.loglikelihood(pairs)
        prompts = [Instance("generate_until", {}, (text, until), 0) for text in asked["prompts"]]
        told[f"generate_{name}"] = lm.generate_until(prompts)
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in asked["prompts"]]
    told["rolling"] = lm.loglikelihood_rolling(texts)
    chat = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", **common)
    messages = [[{"role": "user", "content": text}] for text in asked["prompts"]]
    said = [chat.apply_chat_template(message) for message in messages]
    told["chat"] = chat.generate_until(
        [Instance("generate_until", {}, (text, until), 0) for text in said]
    )
    json.dump(told, sys.stdout)


main(*sys.argv[1:])
