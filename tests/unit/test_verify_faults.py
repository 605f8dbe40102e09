"""Each planted fault fails the requirement it is about, alone, and names the consumer's line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from header_folders import copy_folder, write_app, write_native
from planted_faults import COUNTER, FAULTS, LM_HEAD, change_tensors

from fastvlm_mlx.convert import verify
from fastvlm_mlx.errors import CheckpointMismatch

# consumer | folder | fault | requirement that fails | its line | what is said of it
TABLE = """
native | bf16 | no CLIP head | tensors.clip-head | vision.py:641 | head.proj
mlx-vlm | bf16 | no CLIP head | tensors.clip-head | vision.py:641 | head.proj
mlx-swift-lm | bf16 | no CLIP head | tensors.clip-head | FastVLM.swift:828 | head.proj
native | bf16 | a BatchNorm counter | tensors.no-others | store.py:_check_fit | num_batches_tracked
mlx-swift-lm | bf16 | a BatchNorm counter | tensors.no-others | Load.swift:429 | num_batches_tracked
native | bf16 | OIHW | tensors.repmixer | vision.py:335 | [96, 1, 3, 3], not [96, 3, 3, 1]
mlx-vlm | bf16 | OIHW | tensors.repmixer | vision.py:335 | [96, 1, 3, 3], not [96, 3, 3, 1]
mlx-swift-lm | bf16 | OIHW | tensors.repmixer | FastVLM.swift:653 | [96, 1, 3, 3], not [96, 3, 3, 1]
mlx-swift-lm | bf16 | PyTorch's layer scale | tensors.tower-attention | FastVLM.swift:682 | scale_1
mlx-swift-lm | bf16 | no variance | tensors.repmixer-ffn | FastVLM.swift:358 | running_var
mlx-swift-lm | bf16 | a head beside a tied one | tensors.no-others | Load.swift:429 | lm_head
native | bf16 | whole numbers | tensors.dtypes | store.py:_check_fit | I32
native | bf16 | unsorted | tensors.sorted | tensors.py:find_tensors | stands where
native | bf16 | PyTorch's metadata | tensors.metadata | utils.py:1199 | pt
native | bf16 | a tensor the index lacks | files.index | tensors.py:find_tensors | mm_projector.0
mlx-vlm | bf16 | half a file | files.weights | utils.py:438 | truncated
native | bf16 | an adapter below | files.no-strays | tensors.py:find_tensors | extra/adapter
app | app | an adapter below | files.no-strays | Load.swift:71 | extra/adapter
app | app | a head beside a tied one | tensors.no-others | Load.swift:102 | lm_head
app | app | a tower tensor | tensors.no-others | Load.swift:102 | head.proj
mlx-swift-lm | bf16 | no num_classes | config.vision.num_classes | FastVLM.swift:35 | missing
mlx-swift-lm | bf16 | no layers | config.vision.layers | FastVLM.swift:32 | missing
native | bf16 | ratios of 4.0 | config.vision.mlp_ratios | FastVLM.swift:34 | whole numbers
mlx-swift-lm | bf16 | ratios without end | config.vision.mlp_ratios | FastVLM.swift:34 | inf
mlx-swift-lm | bf16 | encodings by name | config.vision.pos_embs_shapes | FastVLM.swift:37 | not a
mlx-swift-lm | bf16 | two ends | config.eos_token_id | FastVLM.swift:67 | [610, 608]
mlx-swift-lm | bf16 | no padding side | config.tokenizer_padding_side | FastVLM.swift:72 | missing
native | bf16 | another end's id | tokenizer.eos-id | Tokenizer.swift:294 | 610
native | bf16 | another end for answers | generation.eos | utils.py:106 | 610
mlx-vlm | bf16 | an image id | config.image_token_index | processing.py:308 | 611, not -200
mlx-vlm | bf16 | a text_config | config.text_config | config.py:63 | must be absent
mlx-vlm | bf16 | model type fastvlm | config.model_type | utils.py:46 | fastvlm
mlx-vlm | bf16 | linear rope | config.rope_scaling | qwen2/language.py:38 | must be absent
app | app | linear rope | config.rope_scaling | FastVLM.swift:98 | mrope_section
app | app | fractions in mrope | config.rope_scaling | FastVLM.swift:98 | mrope_section
app | app | the sentinel | config.image_token_index | FastVLM.swift:640 | -200
mlx-vlm | q4 | bits of another width | quantization.packed | utils.py:644 | 8 bits in groups of 64
app | app | bits of another width | quantization.packed | Load.swift:88 | 8 bits in groups of 64
mlx-vlm | q4 | no quantization | quantization.setting | utils.py:655 | no quantization
native | q4 | quantization_config differs | quantization.copy | utils.py:464 | quantization_config
mlx-swift-lm | q4 | mixed, mlx-vlm's path | quantization.packed | Load.swift:420 | mm_projector.0
native | q4 | mixed, mlx-vlm's path | quantization.both-spellings | Load.swift:420 | layers.0
mlx-vlm | q4 | mixed, Swift's path | quantization.packed | utils.py:644 | mm_projector.0
mlx-vlm | q4 | a setting of a norm | quantization.overrides | utils.py:643 | model.norm
native | q4 | a setting without mode | quantization.setting | source_config.py:_quant | mode is
mlx-swift-lm | q4 | a remark | quantization.keys | BaseConfiguration.swift:171 | recipe
native | q4 | a remark | quantization.keys | BaseConfiguration.swift:171 | recipe
native | q4 | a packed tower | quantization.tower | store.py:_check_fit | qkv
app | app | a mode | quantization.uniform | BaseConfiguration.swift:117 | mode
app | app | a setting of one module | quantization.uniform | BaseConfiguration.swift:117 | embed
mlx-swift-lm | bf16 | LLaVA's processor | processor.class | VLMModelFactory.swift:138 | Llava
app | app | FastVLM's processor | processor.class | FastVLM.swift:494 | FastVLMProcessor
mlx-swift-lm | bf16 | no crop width | processor.crop_width | FastVLM.swift:938 | missing
app | app | no shortest edge | processor.shortest_edge | FastVLM.swift:674 | missing
mlx-swift-lm | bf16 | a string template | template.list | FastVLM.swift:1006 | such messages
mlx-vlm | bf16 | a template in Latin-1 | template.string | prompt_utils.py:400 | cannot be read
mlx-swift-lm | bf16 | a template in Latin-1 | template.list | FastVLM.swift:1006 | cannot be read
mlx-vlm | bf16 | a folder for a template | template.string | prompt_utils.py:400 | cannot be read
native | bf16 | a folder for a template | files.template | FastVLM.swift:1006 | there is no chat
mlx-vlm | bf16 | a template that nests without end | template.string | prompt_utils.py:400 | fails
mlx-vlm | bf16 | a template that formats nothing | template.string | prompt_utils.py:400 | fails
native | bf16 | two templates | template.same | Hub.swift:199 | tokenizer_config.json
mlx-swift-lm | bf16 | clean-up | tokenizer.clean-up | Tokenizer.swift:332 | True
mlx-swift-lm | bf16 | clean-up by default | tokenizer.clean-up | Tokenizer.swift:332 | missing
native | bf16 | another end | tokenizer.eos | Tokenizer.swift:273 | <|endoftext|>
app | app | another end | tokenizer.eos | Tokenizer.swift:273 | <|endoftext|>
native | bf16 | <image> as a token | tokenizer.no-image | tokenizer_files.py:read_tokenizer | added
app | app | no <image> | tokenizer.image | FastVLM.swift:548 | no added token <image>
app | app | <image> as text | tokenizer.image | FastVLM.swift:548 | not special
app | app | 7B's tokens | tokenizer.image | FastVLM.swift:548 | 612
app | app | float16 features | coreml.output | FastVLM.swift:315 | float16
app | app | features by another name | coreml.output | FastVLM.swift:315 | 'features'
app | app | features of a picture's form | coreml.output | FastVLM.swift:315 | [1, 3072, 16, 16]
app | app | a list for the root model | coreml.package | FastVLM.swift:283 | root model
app | app | no weight.bin | coreml.package | FastVLM.swift:283 | weight.bin
app | app | weight.bin cut short | coreml.package | FastVLM.swift:283 | truncated
"""
ROWS = [tuple(line.split(" | ")) for line in TABLE.strip().splitlines()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("verified")
    made = {run: write_native(root / run, run) for run in ("bf16", "q4")}
    return made | {"app": write_app(root / "app")}


def failed(folder: Path, name: str) -> list[verify.Finding]:
    return [finding for finding in verify.verify(folder, name) if finding.passed is False]


@pytest.mark.parametrize(
    ("name", "made", "fault", "requirement", "line", "said"),
    ROWS,
    ids=[f"{name}: {fault}" for name, _, fault, *_ in ROWS],
)
def test_a_planted_fault_fails_its_requirement_alone_and_names_the_line(
    folders: dict[str, Path],
    tmp_path: Path,
    name: str,
    made: str,
    fault: str,
    requirement: str,
    line: str,
    said: str,
) -> None:
    """Each is a fault that a port, a converter or a hand-edited folder has had (FORMATS B, D)."""
    folder = copy_folder(folders[made], tmp_path / "copy")
    FAULTS[fault](folder)
    (finding,) = failed(folder, name)
    assert finding.requirement == requirement
    assert finding.cite.endswith(f"/{line}")
    assert said in finding.detail
    assert "\n" not in finding.detail
    with pytest.raises(CheckpointMismatch, match=f"for {name}: {re.escape(requirement)}: "):
        verify.require(folder, name)


def test_every_fault_is_planted_somewhere() -> None:
    assert {fault for _, _, fault, *_ in ROWS} == set(FAULTS)
    assert {name for name, *_ in ROWS} == set(verify.CONSUMERS)


def test_mlx_vlm_drops_what_swift_chokes_on(folders: dict[str, Path], tmp_path: Path) -> None:
    """BatchNorm counters, and a head beside a tied embedding: what one sanitizes, one refuses."""
    folder = copy_folder(folders["bf16"], tmp_path / "copy")
    change_tensors(folder, add={COUNTER: ("I64", []), LM_HEAD: ("BF16", [1024, 128])})
    assert failed(folder, "mlx-vlm") == []
    assert [f.requirement for f in failed(folder, "mlx-swift-lm")] == ["tensors.no-others"]
