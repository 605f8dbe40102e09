"""transformers' own FastVLM on torch as a runtime to compare, by its public functions.

Knows `FastVlmForConditionalGeneration` with timm's `fastvit_mci3`, its processor and `generate`.
Run by `fastvlm_mlx/bench/peer_process.py` under a Python that has torch; nothing of our engine is
imported. It takes random weights of real size alone, whose tokenizer is the demo's: they are
rewritten once, beside the folder that ours reads, under transformers' names (`tests/parity/
sources.py` has the tables); that is not timed.

Imposed: the dtype, the side of the square pictures (a photo would be cropped, not padded), greedy
choice, and that no id stops an answer. Threads are torch's own choice.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from fastvlm_mlx.bench.peer import (
    PICTURE_ID,
    About,
    Answered,
    Loaded,
    Shown,
    StageClock,
    TokenClock,
    Work,
    installed,
    pixel_digest,
)
from fastvlm_mlx.bench.worker import serve

ROOT = Path(__file__).parents[2]
PARITY = ROOT / "tests" / "parity"
DEMO = ROOT / "fastvlm_mlx" / "demo"
SMALL_FILES = (
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


class TransformersTorch:
    """The model and processor of `from_pretrained`, on the CPU."""

    def load(self, model: str, *, dtype: str, device: str) -> Loaded:
        """Import what a user imports, and load."""
        if device != "cpu":
            raise RuntimeError("this peer runs on the CPU alone")
        folder = converted(Path(model))
        began = time.perf_counter()
        import torch
        from transformers import AutoProcessor, FastVlmForConditionalGeneration

        imported = time.perf_counter()
        self.torch = torch
        self.processor = AutoProcessor.from_pretrained(folder)
        processed = time.perf_counter()
        self.model = FastVlmForConditionalGeneration.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()
        loaded = time.perf_counter()
        self.model.generation_config.eos_token_id = None
        return Loaded(
            import_ms=(imported - began) * 1000,
            load_ms=(loaded - imported) * 1000,
            weights_ms=(loaded - processed) * 1000,
        )

    def about(self) -> About:
        """Return versions and the size of the weights."""
        versions = installed("transformers", "torch", "timm")
        return About(
            name=f"transformers {versions['transformers']}, torch {versions['torch']}",
            versions=versions,
            weight_bytes=sum(p.numel() * p.element_size() for p in self.model.parameters()),
        )

    def show(self, work: Work) -> Shown:
        """Return the processor's ids, each picture's run of them as one, and its pixels."""
        inputs = self._inputs(work, self._first(work))
        picture, ids = self.model.config.image_token_id, []
        for token_id in inputs["input_ids"][0].tolist():
            if token_id != picture:
                ids.append(token_id)
            elif ids[-1:] != [PICTURE_ID]:
                ids.append(PICTURE_ID)
        whole = (inputs["pixel_values"] * 255).round().to(self.torch.uint8).permute(0, 2, 3, 1)
        pixels = [pixel_digest(picture.contiguous().numpy()) for picture in whole]
        return Shown(prompt_ids=ids, pixels=pixels)

    def ttft(self, work: Work) -> Answered:
        """Answer by the processor and `generate`, its streamer telling when each id came."""
        return self._answered(work, self._first(work), work.max_tokens)

    def profile(self, work: Work) -> dict[str, float]:
        """Return its stages by the parts of its model, in the order of `FastVlmModel.forward`."""
        from PIL import Image

        model, processor = self.model.model, self.processor
        self._fit_to(work.resolution)
        with self.torch.inference_mode():
            clock = StageClock()
            pictures = [Image.open(path).convert("RGB") for path in work.pictures]
            clock.done("image_decode_ms")
            pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            clock.done("preprocess_ms")
            seen = model.vision_tower(pixels, return_dict=True).last_hidden_state
            clock.done("vision_ms")
            features = model.multi_modal_projector(seen.flatten(2).permute(0, 2, 1))
            clock.done("projector_ms")
            text = self._rendered(self._first(work))
            many = processor.image_token * features.shape[1]
            ids = processor.tokenizer(
                text.replace(processor.image_token, many), return_tensors="pt"
            )["input_ids"]
            embeddings = model.get_input_embeddings()(ids)
            here = model.get_placeholder_mask(ids, embeddings, features)
            embeddings = embeddings.masked_scatter(here, features)
            clock.done("prompt_ms")
            hidden = model.language_model(inputs_embeds=embeddings, use_cache=True)
            clock.done("prefill_ms")
            self.model.lm_head(hidden.last_hidden_state[:, -1]).argmax().item()
            clock.done("first_token_ms")
        return clock.stage_ms

    def second_turn(self, work: Work) -> Answered:
        """Answer, then ask again with the whole conversation, which it computes anew."""
        messages = self._first(work)
        first = self._answered(work, messages, work.first_answer_tokens)
        said = self.processor.tokenizer.decode(first.token_ids, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
        asked = [{"type": "text", "text": work.follow_up}]
        messages.append({"role": "user", "content": asked})
        return self._answered(work, messages, 1)

    def memory(self) -> dict[str, int]:
        """Return nothing: torch does not count what it holds on a CPU."""
        return {}

    def _answered(self, work: Work, messages: list[dict[str, Any]], tokens: int) -> Answered:
        clock = TokenClock()
        inputs = self._inputs(work, messages)
        self.model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, streamer=_Streamer(clock)
        )
        return clock.answered(prompt_tokens=int(inputs["input_ids"].shape[1]))

    def _inputs(self, work: Work, messages: list[dict[str, Any]]) -> Any:
        """Return what `generate` takes: pictures opened and fitted, text rendered, tokenized."""
        from PIL import Image

        self._fit_to(work.resolution)
        pictures = [Image.open(path).convert("RGB") for path in work.pictures]
        text = self._rendered(messages)
        return self.processor(images=pictures or None, text=text, return_tensors="pt")

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return text

    def _first(self, work: Work) -> list[dict[str, Any]]:
        content = [{"type": "image"} for _ in work.pictures]
        return [{"role": "user", "content": [*content, {"type": "text", "text": work.question}]}]

    def _fit_to(self, side: int) -> None:
        processor = self.processor.image_processor
        processor.size = {"shortest_edge": side}
        processor.crop_size = {"height": side, "width": side}


class _Streamer:
    """Counts ids as `generate` puts them; the first put is the prompt."""

    def __init__(self, clock: TokenClock) -> None:
        self.clock = clock
        self.begun = False

    def put(self, ids: Any) -> None:
        """Take the prompt, then one id at a time."""
        if self.begun:
            self.clock.token(int(ids))
        self.begun = True

    def end(self) -> None:
        """Do nothing at the end."""


def converted(folder: Path) -> Path:
    """Return the same weights by transformers' names, written beside the folder at first."""
    target = folder.with_name(folder.name + "-transformers")
    if (target / "config.json").exists():
        return target
    sys.path.insert(0, str(PARITY))
    import sources
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    names = {
        sources.TIMM + key: sources.mlx_key(sources.APPLE + sources.apple_key(key))
        for key in json.loads((PARITY / "keys_timm_fused.json").read_text())
    }
    tensors = {}
    target.mkdir(exist_ok=True)
    with safe_open(folder / "model.safetensors", "pt") as stored:
        for key in stored.keys():  # noqa: SIM118  (no mapping)
            if not key.startswith("vision_tower."):
                tensors[_by_transformers(key)] = stored.get_tensor(key)
        for name, key in names.items():
            if key is None:  # a counter of batches seen, which nothing reads
                tensors[name] = torch.zeros((), dtype=torch.int64)
                continue
            tensor = stored.get_tensor(key)
            if "layer_scale" in key:
                tensor = tensor.permute(2, 0, 1)
            elif tensor.ndim == 4:
                tensor = tensor.permute(0, 3, 1, 2)
            tensors[name] = tensor.contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for name in SMALL_FILES:
        shutil.copy(DEMO / name, target)
    (target / "config.json").write_text(json.dumps(config(folder)))
    return target


def config(folder: Path) -> dict[str, Any]:
    """Return transformers' config.json: the real tower, and the decoder's sizes of the folder."""
    given = json.loads((folder / "config.json").read_text())
    values: dict[str, Any] = json.loads((PARITY / "config_fast_vlm.json").read_text())
    demo = json.loads((DEMO / "config.json").read_text())
    text = values["text_config"]
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
                 "num_key_value_heads", "rms_norm_eps", "vocab_size"):  # fmt: skip
        text[name] = given[name]
    text["layer_types"] = ["full_attention"] * text["num_hidden_layers"]
    text["rope_parameters"] = {"rope_theta": given["rope_theta"], "rope_type": "default"}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text[name] = demo["text_config"][name]
    text["tie_word_embeddings"] = values["tie_word_embeddings"] = given["tie_word_embeddings"]
    values["image_token_index"] = demo["image_token_index"]
    return values


def _by_transformers(key: str) -> str:
    """Return transformers' name of a projector's or decoder's tensor."""
    for ours, theirs in (
        ("mm_projector.0.", "model.multi_modal_projector.linear_1."),
        ("mm_projector.2.", "model.multi_modal_projector.linear_2."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ):
        if key.startswith(ours):
            return theirs + key[len(ours) :]
    raise KeyError(key)


if __name__ == "__main__":
    serve(TransformersTorch())
