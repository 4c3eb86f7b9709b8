"""
Use a learning draft where code already calls transformers: in a pipeline, and with a streamer. Runs offline.

    python examples/streaming_pipeline.py
"""

from transformers import TextStreamer, pipeline

import hf_osd
from hf_osd.evaluation.models import load_pair

PROMPT = "Please generate code based on the following doc:\nReturn True if the path exists, and False otherwise."


def main() -> None:
    """Answer one chat by a pipeline, and stream it."""
    pair = load_pair(None, None)  # the embedded pair
    chat = [{"role": "user", "content": PROMPT}]
    with hf_osd.OnlineAssistant(pair.draft, pair.target) as assistant:
        write = pipeline("text-generation", model=pair.target, tokenizer=pair.tokenizer)
        answer = write(chat, max_new_tokens=64, custom_generate=hf_osd.online_decoding, online_assistant=assistant)
        print("pipeline:", answer[0]["generated_text"][-1]["content"], sep="\n")

        print("streamed:")
        inputs = pair.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(pair.target.device)
        streamer = TextStreamer(pair.tokenizer, skip_prompt=True, skip_special_tokens=True)
        hf_osd.generate(pair.target, **inputs, online_assistant=assistant, max_new_tokens=64, streamer=streamer)
        print(f"{assistant.stats().tokens_per_target_pass:.2f} tokens for each pass of the target")


if __name__ == "__main__":
    main()
