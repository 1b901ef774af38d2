"""Every causal language model of the installed Transformers as a base: right, refused in one sentence, or not tried.

``python -m tools.architectures`` builds a tiny random network of each, gives it a random adapter, conditioned by the
prompt and by a gate, and compares the policy's log-probabilities with those of Transformers and PEFT alone: sequences
one by one without padding, the gate multiplied into the adapter's columns.
"""

from __future__ import annotations

import signal
import sys
import warnings
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from miepo.errors import UserError, first_line
from miepo.policy import Conditioning, GatedConditioning, Policy, PromptConditioning
from miepo.types import Tokens
from tests.helpers.tiny import randomise_adapter, tiny_tokenizer

# what a configuration calls its sizes, and what they become
SIZES = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32, "embedding_size": 32, "dim_model": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "d_ff": 48, "dff": 48,
    "shared_intermediate_size": 16, "expert_ffn_hidden_size": 16,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "dim_head": 8, "attention_head_dim": 8,
    "rotary_dim": 4, "global_head_dim": 8, "swa_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_num_experts": 4,
    "lru_width": 32, "mamba_d_state": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "state_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "time_step_rank": 4, "mamba_dt_rank": 4,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320, "laurel_rank": 4, "num_kv_shared_layers": 0,
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256, "block_size": 256,
    # so that one that is overlooked shows
    "logits_scaling": 3.0, "logit_scale": 0.4, "lm_head_multiplier": 0.4, "final_logit_softcapping": 5.0,
    "logits_soft_cap": 5.0, "output_logit_soft_cap": 5.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
    "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "layerdrop": 0.0,
    "initializer_range": 0.2, "init_std": 0.2, "use_cache": True, "is_decoder": True, "causal": True,
}  # fmt: skip
# sizes that a type wants to agree with others of its own
OF_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16}, "granitemoehybrid": {"mamba_d_head": 16}, "mamba2": {"head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "nemotron": {"num_key_value_heads": 2}, "zaya": {"num_experts_per_tok": 1},
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "whisper": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {"axial_pos_embds_dim": (16, 16)},
}  # fmt: skip
LARGEST = 30_000_000  # parameters: a size that SIZES does not know
SECONDS = 120
PROMPTS = ["the garden", "people like rain in spring when it is good"]
RESPONSES = [[[9, 22, 40, 8], [31, 12]], [[17, 25, 60], [44]]]  # n = 2 for each, as ids
PREFERENCES = torch.tensor([[0.2, 0.8], [0.9, 0.1]])
WAYS: dict[str, list[Conditioning]] = {
    "prompt": [PromptConditioning()],
    "gate": [GatedConditioning(shared=False)],
}


def tiny_config(kind: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return a configuration of this type in which every size that is known is small."""
    plain: Any = CONFIG_MAPPING[kind]()
    inner = plain.get_text_config(decoder=True)
    fields = inner.to_dict().keys() | set(getattr(inner, "attribute_map", {}))
    sizes = {k: v for k, v in SIZES.items() if k in fields and _of_all_layers(inner, k) is not None}
    sizes |= {"vocab_size": len(tokenizer), "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
    for name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types"):
        if isinstance(given := inner.to_dict().get(name), (list, tuple)) and given:
            kinds = list(dict.fromkeys(given))  # one layer of each kind, and at least two
            sizes[name] = kinds if len(kinds) > 1 else kinds * 2
            sizes["num_hidden_layers"] = len(sizes[name])
    return type(inner)(**sizes | OF_TYPE.get(kind, {}))


def _of_all_layers(config: Any, name: str) -> Any:
    """Return a size of a configuration; None where it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # AmbiguousGlobalPerLayerAttributeError, which Transformers does not export
        return None


def expected(base: Path, policy: Policy, folder: Path, gated: bool, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """Return the log-probabilities ``(B, n, T)`` by Transformers and PEFT, one sequence at a time.

    And weights PEFT loses.
    """
    out, lost = torch.zeros(2, 2, 4, dtype=dtype), 0
    for b, prompt in enumerate(PROMPTS):
        adapter = folder / f"adapter_{b}"
        adapter.mkdir()
        w = PREFERENCES[b : b + 1]
        policy.save_adapter(adapter, policy.gate_of(w) if gated else None)
        network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
        # of some networks PEFT does not find all that it wrote
        weights = {n.removeprefix("model."): p for n, p in policy.adapter_parameters().items()}
        found_by_name = dict(network.named_parameters())
        scale = policy.gate_of(w)[0] if gated else None
        lost = 0
        for name, weight in weights.items():
            wanted = weight * scale if gated and ".lora_B." in name else weight
            if not torch.equal(found_by_name[name], wanted):
                found_by_name[name].data.copy_(wanted)
                lost += 1
        for i, response in enumerate(RESPONSES[b]):
            start = policy.template.encode(prompt, policy.preference_text(w[0].tolist()))
            ids = torch.tensor([[*start, *response]])
            with torch.no_grad():
                logits = network.eval()(input_ids=ids, use_cache=False).logits
            found = logits[0, len(start) - 1 : -1].log_softmax(-1).gather(-1, ids[0, len(start) :, None])
            out[b, i, : len(response)] = found[:, 0]
    return out, lost


def compare(
    base: Path, way: str, targets: str | list[str], dtype: torch.dtype = torch.float32
) -> tuple[float, Policy, int]:
    """Return the largest difference, relative to a log-probability or in nats; the policy; weights that PEFT loses."""
    policy = Policy(
        str(base), WAYS[way], lora_rank=2, lora_alpha=4, lora_dropout=0, lora_targets=targets, dtype="float32"
    )
    randomise_adapter(policy.build(["first", "second"])).to(dtype).eval()
    lengths = torch.tensor([[len(r) for r in rows] for rows in RESPONSES])
    ids = torch.tensor([[[*r, *[1] * (4 - len(r))] for r in rows] for rows in RESPONSES])
    responses = Tokens(ids, torch.arange(4) < lengths.unsqueeze(-1))
    with TemporaryDirectory() as folder:
        truth, lost = expected(base, policy, Path(folder), way == "gate", dtype)
    with torch.no_grad():
        found = policy.response_log_prob(PROMPTS, PREFERENCES.unsqueeze(1), responses)[:, :, 0]
    return float(((found - truth).abs() / truth.abs().clamp(min=1)).max()), policy, lost


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def cell(base: Path, way: str) -> tuple[str, str, str]:
    """Return outcome, its words, and how the policy reads the network."""
    said = ""
    for targets in ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj"]):
        try:
            gap, policy, lost = compare(base, way, targets)
        except UserError as error:
            said = said or first_line(error)
            continue
        except Exception as error:
            return "failed", f"failed: {type(error).__name__}: {first_line(error)}"[:160], ""
        how = ("trees" if policy.plain_attention else "one by one") + (", own head" if policy.own_head else "")
        narrow = "" if targets == "all-linear" else ", attention alone"
        narrow += f"; PEFT does not find {lost} weights of the adapter it wrote" if lost else ""
        if gap > 1e-5 and (exact := compare(base, way, targets, torch.float64)[0]) <= 1e-5:  # it was rounding
            return "equal", f"{exact:.0e} in float64 ({gap:.0e} in float32){narrow}", how
        return ("equal", f"{gap:.0e}{narrow}", how) if gap <= 1e-5 else ("differs", f"**differs by {gap:.1e}**", how)
    return "refused", f"refused: {said.replace(str(base), '..')}"[:230], ""


def row(kind: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Return outcomes, and a line of the table."""
    with TemporaryDirectory() as folder:
        try:
            with at_most(SECONDS):
                torch.manual_seed(0)
                config = tiny_config(kind, tokenizer)
                with torch.device("meta"):
                    size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
                if size > LARGEST:
                    return ["not tried"], [f"not tried: {size / 1e6:.0f} M parameters at the sweep's sizes", "", ""]
                AutoModelForCausalLM.from_config(config).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        except Exception as error:
            return ["not tried"], [f"not tried: {type(error).__name__}: {first_line(error)}"[:160], "", ""]
        try:
            with at_most(SECONDS):
                cells = [cell(Path(folder), way) for way in WAYS]
        except TimeoutError as error:
            return ["failed"], [f"failed: {error}", "", ""]
    return [c[0] for c in cells], [cells[0][1], cells[1][1], cells[0][2]]


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m tools.architectures", description=__doc__)
    parser.add_argument("--only", nargs="+", help="of these types alone")
    parser.add_argument("--out", type=Path, help="a file for the table; by default it is printed")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer, counts, lines = tiny_tokenizer(chat=False), Counter[str](), []
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if options.only and kind not in options.only:
            continue
        outcomes, cells = row(kind, tokenizer)
        counts.update([outcomes[0]])
        lines.append(f"| {kind} | {' | '.join(c.replace('|', '/').replace(chr(10), ' ') for c in cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    text = (
        "# Architectures\n\n"
        f"`python -m tools.architectures --out tools/architectures.md`, Transformers {transformers.__version__}, torch "
        f"{torch.__version__}, float32. Conditioned by the prompt: {said}.\n\n"
        "Numbers are the largest difference from the log-probabilities of Transformers and PEFT, relative to each\n"
        "or in nats. *trees* and *one by one* say how the policy reads the network, *own head* that its logits are\n"
        "more than a product.\n\n| type | by the prompt | by the gate | read |\n|---|---|---|---|\n"
    )
    text += "\n".join(lines)
    if options.out:
        options.out.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
