"""The checkpoint in Hugging Face's layout, names as K2.5's, routed experts as compressed-tensors int4 pack-quantized."""

import json

import torch
from safetensors.torch import load_file, save_file

from model import GROUP


def pack(w):
    """([rows, cols / 8] int32, [rows, cols / 32] bf16) as fake_int4 rounds."""
    groups = w.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-8).bfloat16()
    q = ((groups / scale.float()).round().clamp(-8, 7) + 8).flatten(-2).to(torch.int64)
    words = (q.unflatten(-1, (-1, 8)) << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2 ** 31, words - 2 ** 32, words).to(torch.int32).contiguous(), scale.squeeze(-1).contiguous()


def tensors(model, int4=True, prefix="language_model."):
    c, out = model.c, {}
    s = {k: v.detach().cpu().float() for k, v in model.state_dict().items()}
    put = lambda name, w: out.__setitem__(prefix + name, w.bfloat16().contiguous())
    put("model.embed_tokens.weight", s["embed"])
    put("lm_head.weight", s["head"])
    put("model.norm.weight", s["norm"])
    for l in range(c["num_hidden_layers"]):
        at, m = f"model.layers.{l}.", l - 1
        put(at + "input_layernorm.weight", s["norm_in"][l])
        put(at + "post_attention_layernorm.weight", s["norm_post"][l])
        for name, key in (("q_a_proj", "q_a"), ("q_b_proj", "q_b"), ("kv_a_proj_with_mqa", "kv_a"), ("kv_b_proj", "kv_b"), ("o_proj", "o"),
                          ("q_a_layernorm", "norm_q"), ("kv_a_layernorm", "norm_kv")):
            put(at + f"self_attn.{name}.weight", s[key][l])
        if l == 0:
            put(at + "mlp.gate_proj.weight", s["dense_in"][0])
            put(at + "mlp.up_proj.weight", s["dense_in"][1])
            put(at + "mlp.down_proj.weight", s["dense_out"])
            continue
        put(at + "mlp.gate.weight", s["router"][m])
        out[prefix + at + "mlp.gate.e_score_correction_bias"] = s["bias"][m].contiguous()
        put(at + "mlp.shared_experts.gate_proj.weight", s["shared_in"][m][0])
        put(at + "mlp.shared_experts.up_proj.weight", s["shared_in"][m][1])
        put(at + "mlp.shared_experts.down_proj.weight", s["shared_out"][m])
        for e in range(c["n_routed_experts"]):
            for name, w in (("gate_proj", s["expert_in"][m][e][0]), ("up_proj", s["expert_in"][m][e][1]), ("down_proj", s["expert_out"][m][e])):
                full = at + f"mlp.experts.{e}.{name}.weight"
                if not int4:
                    put(full, w)
                    continue
                words, scale = pack(w)
                out[prefix + full + "_packed"], out[prefix + full + "_scale"] = words, scale
                out[prefix + full + "_shape"] = torch.tensor(w.shape, dtype=torch.int32)
    return out


QUANTIZATION = {
    "config_groups": {"group_0": {"input_activations": None, "output_activations": None, "targets": ["Linear"],
                                  "weights": {"actorder": None, "block_structure": None, "dynamic": False, "group_size": GROUP, "num_bits": 4,
                                              "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int"}}},
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed"}


def config(c, base, int4=True):
    ids = {"bos_token_id": base, "eos_token_id": base + 1, "pad_token_id": base + 255}
    keys = ("vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads n_shared_experts n_routed_experts "
            "num_experts_per_tok first_k_dense_replace kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim routed_scaling_factor "
            "rms_norm_eps rope_theta").split()
    text = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2", "dtype": "bfloat16", "hidden_act": "silu", "attention_bias": False,
            "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "seq_aux": True, "initializer_range": 0.02, "max_position_embeddings": 262144,
            "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
            "num_key_value_heads": c["num_attention_heads"], "num_nextn_predict_layers": 0, "pretraining_tp": 1, "tie_word_embeddings": False,
            "use_cache": True, **{k: c[k] for k in keys}, **ids,
            "rope_scaling": {"type": "yarn", "factor": c["factor"], "beta_fast": c["beta_fast"], "beta_slow": c["beta_slow"], "mscale": 1.0,
                             "mscale_all_dim": 1.0, "original_max_position_embeddings": c["original"]}}
    if int4:
        text["quantization_config"] = QUANTIZATION
    return {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "dtype": "bfloat16", "ignore_index": -100,
            "media_placeholder_token_id": base + 21, "tie_word_embeddings": False, "use_unified_vision_chunk": True,
            "video_placeholder": "<|kimi_k25_video_placeholder|>", **ids, "text_config": text}


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, indent=2, sort_keys=True)
        f.write("\n")


def write(model, folder, base):
    save_file(tensors(model), folder + "/model.safetensors", metadata={"format": "pt"})
    write_json(folder + "/config.json", config(model.c, base))
    write_json(folder + "/generation_config.json", {"eos_token_id": base + 2, "max_length": 4096})


def write_bf16(model, folder):
    """Everything unquantised, in parts of at most 16 MB: train --resume and perplexity read them."""
    state = {k: v.detach().bfloat16().cpu() if k != "bias" else v.cpu() for k, v in model.state_dict().items()}
    experts = state.pop("expert_in")
    parts = [state, {"expert_in.0": experts[:2].contiguous()}, {"expert_in.1": experts[2:].contiguous()}]
    for i, part in enumerate(parts):
        save_file({k: v.contiguous() for k, v in part.items()}, f"{folder}/bf16-{i}.safetensors")


def read_bf16(model, folder):
    state = {}
    for i in range(3):
        state.update(load_file(f"{folder}/bf16-{i}.safetensors"))
    state["expert_in"] = torch.cat([state.pop("expert_in.0"), state.pop("expert_in.1")])
    model.load_state_dict({k: v.float() for k, v in state.items()})


def read_biases(model, folder):
    made = load_file(folder + "/model.safetensors")
    names = [f"language_model.model.layers.{l}.mlp.gate.e_score_correction_bias" for l in range(1, model.c["num_hidden_layers"])]
    model.bias.copy_(torch.stack([made[n] for n in names]))
