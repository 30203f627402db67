"""Published config.json files, as differences from a base; `ABSENT` takes a field away, `None` is a null in the file.

Sizes are the published ones; `shrunken` (published_sizes.py) makes a model of each that fits a test.
"""

from published_sizes import ABSENT

LLAMA = dict(
    architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=4096,
    initializer_range=0.02, intermediate_size=11008, max_position_embeddings=4096, model_type="llama",
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-05,
    rope_scaling=None, tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.31.0.dev0",
    use_cache=True, vocab_size=32000)
LLAMA_1 = dict(LLAMA, max_position_embeddings=2048, num_key_value_heads=ABSENT, pretraining_tp=ABSENT,
               rms_norm_eps=1e-06, rope_scaling=ABSENT, max_sequence_length=2048, transformers_version="4.28.0.dev0")
LLAMA_3 = dict(LLAMA, attention_bias=False, attention_dropout=0.0, bos_token_id=128000, eos_token_id=128001,
               intermediate_size=14336, max_position_embeddings=8192, num_key_value_heads=8, rope_theta=500000.0,
               torch_dtype="bfloat16", transformers_version="4.40.0.dev0", vocab_size=128256)
SCALED = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192,
              rope_type="llama3")
LLAMA_31 = dict(LLAMA_3, max_position_embeddings=131072, mlp_bias=False, rope_scaling=SCALED,
                transformers_version="4.43.0.dev0")
LLAMA_32 = dict(LLAMA_31, head_dim=64, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                rope_scaling=dict(SCALED, factor=32.0), tie_word_embeddings=True, transformers_version="4.45.0.dev0")
B13 = dict(hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_hidden_layers=40,
           num_key_value_heads=40)
B70 = dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80,
           num_key_value_heads=8)
ENDS_31 = [128001, 128008, 128009]
CODE_LLAMA = dict(LLAMA, max_position_embeddings=16384, rope_theta=1000000, torch_dtype="bfloat16", vocab_size=32016,
                  transformers_version="4.32.0.dev0")
CODE_34 = dict(hidden_size=8192, intermediate_size=22016, num_attention_heads=64, num_hidden_layers=48,
               num_key_value_heads=8, vocab_size=32000)
LINEAR_4, LINEAR_8 = dict(factor=4.0, type="linear"), dict(factor=8.0, type="linear")
SMOL = dict(LLAMA, attention_bias=False, attention_dropout=0.0, bos_token_id=0, eos_token_id=0, hidden_size=576,
            intermediate_size=1536, max_position_embeddings=2048, mlp_bias=False, num_attention_heads=9,
            num_hidden_layers=30, num_key_value_heads=3, rope_theta=10000.0, tie_word_embeddings=True,
            torch_dtype="bfloat16", transformers_version="4.42.3", vocab_size=49152)
SMOL_2 = dict(SMOL, initializer_range=0.041666666666666664, is_llama_config=True, max_position_embeddings=8192,
              rope_interleaved=False, rope_theta=100000, transformers_version="4.40.1")
SMOL_17 = dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_hidden_layers=24,
               num_key_value_heads=32)
YI = dict(LLAMA, num_key_value_heads=4, pad_token_id=0, rope_theta=5000000.0, torch_dtype="bfloat16", vocab_size=64000,
          transformers_version="4.34.0")
DEEPSEEK = dict(LLAMA, bos_token_id=100000, eos_token_id=100001, num_hidden_layers=30, rms_norm_eps=1e-06,
                rope_theta=10000.0, torch_dtype="bfloat16", transformers_version="4.33.1", vocab_size=102400)
DEEPSEEK_CODER = dict(LLAMA, bos_token_id=32013, eos_token_id=32014, max_position_embeddings=16384, rms_norm_eps=1e-06,
                      rope_scaling=LINEAR_4, rope_theta=100000, torch_dtype="bfloat16", transformers_version="4.33.1",
                      vocab_size=32256)
MISTRAL = dict(
    architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=4096,
    initializer_range=0.02, intermediate_size=14336, max_position_embeddings=32768, model_type="mistral",
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=10000.0,
    sliding_window=4096, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.34.0.dev0",
    use_cache=True, vocab_size=32000)
MISTRAL_2 = dict(MISTRAL, attention_dropout=0.0, rope_theta=1000000.0, sliding_window=None,
                 transformers_version="4.42.0.dev0")
NEMO = dict(MISTRAL_2, head_dim=128, hidden_size=5120, max_position_embeddings=128000, num_hidden_layers=40,
            vocab_size=131072)
QWEN_2 = dict(
    architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643,
    hidden_act="silu", hidden_size=3584, initializer_range=0.02, intermediate_size=18944,
    max_position_embeddings=131072, max_window_layers=28, model_type="qwen2", num_attention_heads=28,
    num_hidden_layers=28, num_key_value_heads=4, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.37.2", use_cache=True,
    use_sliding_window=False, vocab_size=152064)
QWEN_25 = dict(QWEN_2, transformers_version="4.40.1", use_mrope=False)
QWEN_HALF = dict(hidden_size=896, intermediate_size=4864, max_position_embeddings=32768, max_window_layers=24,
                 num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2, sliding_window=32768,
                 tie_word_embeddings=True, vocab_size=151936)
QWEN_15 = dict(hidden_size=1536, intermediate_size=8960, max_window_layers=21, num_attention_heads=12,
               num_key_value_heads=2, vocab_size=151936)
QWEN_32 = dict(hidden_size=5120, intermediate_size=27648, max_window_layers=64, num_attention_heads=40,
               num_hidden_layers=64, num_key_value_heads=8, rms_norm_eps=1e-05)
QWEN_3 = dict(
    architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
    eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=4096, initializer_range=0.02,
    intermediate_size=12288, max_position_embeddings=40960, max_window_layers=36, model_type="qwen3",
    num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None,
    rope_theta=1000000, sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16",
    transformers_version="4.51.0", use_cache=True, use_sliding_window=False, vocab_size=151936)
QWEN_3_06 = dict(QWEN_3, hidden_size=1024, intermediate_size=3072, max_window_layers=28, num_attention_heads=16,
                 num_hidden_layers=28, tie_word_embeddings=True)
MIXTRAL = dict(
    MISTRAL, architectures=["MixtralForCausalLM"], attention_dropout=0.0, model_type="mixtral", num_experts_per_tok=2,
    num_local_experts=8, output_router_logits=False, rope_theta=1000000.0, router_aux_loss_coef=0.02,
    sliding_window=None, transformers_version="4.36.0.dev0")
QWEN_3_MOE = dict(
    architectures=["Qwen3MoeForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
    decoder_sparse_step=1, eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=2048,
    initializer_range=0.02, intermediate_size=6144, max_position_embeddings=40960, max_window_layers=48,
    mlp_only_layers=[], model_type="qwen3_moe", moe_intermediate_size=768, norm_topk_prob=True, num_attention_heads=32,
    num_experts=128, num_experts_per_tok=8, num_hidden_layers=48, num_key_value_heads=4, output_router_logits=False,
    rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000.0, router_aux_loss_coef=0.001, sliding_window=None,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.51.0", use_cache=True,
    use_sliding_window=False, vocab_size=151936)
GPT_OSS = dict(
    architectures=["GptOssForCausalLM"], attention_bias=True, attention_dropout=0.0, eos_token_id=200002,
    experts_per_token=4, head_dim=64, hidden_act="silu", hidden_size=2880, initial_context_length=4096,
    initializer_range=0.02, intermediate_size=2880, layer_types=["sliding_attention", "full_attention"] * 12,
    max_position_embeddings=131072, model_type="gpt_oss", num_attention_heads=64, num_experts_per_tok=4,
    num_hidden_layers=24, num_key_value_heads=8, num_local_experts=32, output_router_logits=False, pad_token_id=199999,
    quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=[
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]),
    rms_norm_eps=1e-05, rope_scaling=dict(beta_fast=32.0, beta_slow=1.0, factor=32.0, rope_type="yarn", truncate=False,
                                          original_max_position_embeddings=4096),
    rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=128, swiglu_limit=7.0, tie_word_embeddings=False,
    transformers_version="4.55.0.dev0", use_cache=True, vocab_size=201088)
GEMMA = dict(
    architectures=["GemmaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=2, eos_token_id=1,
    head_dim=256, hidden_act="gelu", hidden_activation=None, hidden_size=2048, initializer_range=0.02,
    intermediate_size=16384, max_position_embeddings=8192, model_type="gemma", num_attention_heads=8,
    num_hidden_layers=18, num_key_value_heads=1, pad_token_id=0, rms_norm_eps=1e-06, rope_scaling=None,
    rope_theta=10000.0, torch_dtype="bfloat16", transformers_version="4.38.0.dev0", use_cache=True, vocab_size=256000)
GEMMA_2 = dict(
    GEMMA, architectures=["Gemma2ForCausalLM"], attn_logit_softcapping=50.0, cache_implementation="hybrid",
    final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
    hidden_size=2304, intermediate_size=9216, model_type="gemma2", num_hidden_layers=26, num_key_value_heads=4,
    query_pre_attn_scalar=256, rope_scaling=ABSENT, sliding_window=4096, transformers_version="4.42.4")
GEMMA_3 = dict(
    architectures=["Gemma3ForCausalLM"], attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=None,
    bos_token_id=2, cache_implementation="hybrid", eos_token_id=[1, 106], final_logit_softcapping=None, head_dim=256,
    hidden_activation="gelu_pytorch_tanh", hidden_size=1152, initializer_range=0.02, intermediate_size=6912,
    max_position_embeddings=32768, model_type="gemma3_text", num_attention_heads=4, num_hidden_layers=26,
    num_key_value_heads=1, pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_local_base_freq=10000,
    rope_scaling=None, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6, torch_dtype="bfloat16",
    transformers_version="4.50.0.dev0", use_cache=True, vocab_size=262144)
LINEAR_ROPE_8 = dict(factor=8.0, rope_type="linear")
GPT_2 = dict(
    activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1, bos_token_id=50256,
    embd_pdrop=0.1, eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-05, model_type="gpt2", n_ctx=1024,
    n_embd=768, n_head=12, n_layer=12, n_positions=1024, resid_pdrop=0.1, summary_activation=None,
    summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index", summary_use_proj=True,
    task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}}, vocab_size=50257)
OLMO_2 = dict(
    architectures=["Olmo2ForCausalLM"], attention_bias=False, attention_dropout=0.0, eos_token_id=100257,
    hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=11008, max_position_embeddings=4096,
    model_type="olmo2", num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, pad_token_id=100277,
    rms_norm_eps=1e-06, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False, torch_dtype="float32",
    transformers_version="4.47.0.dev0", use_cache=True, vocab_size=100352)
PHI_3 = dict(
    architectures=["Phi3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=1, embd_pdrop=0.0,
    eos_token_id=32000, hidden_act="silu", hidden_size=3072, initializer_range=0.02, intermediate_size=8192,
    max_position_embeddings=4096, model_type="phi3", num_attention_heads=32, num_hidden_layers=32,
    num_key_value_heads=32, original_max_position_embeddings=4096, pad_token_id=32000, resid_pdrop=0.0,
    rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0, sliding_window=2047, tie_word_embeddings=False,
    torch_dtype="bfloat16", transformers_version="4.40.2", use_cache=True, vocab_size=32064)
PHI_4_MINI = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283,
    20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77]
LAYERSKIP = dict(attention_bias=False, attention_dropout=0.0, mlp_bias=False, transformers_version="4.45.2")

PUBLISHED = {
    "huggyllama/llama-7b": dict(LLAMA_1, pad_token_id=0),
    "decapoda-research/llama-7b-hf": dict(LLAMA_1, architectures=["LLaMAForCausalLM"], bos_token_id=0, eos_token_id=1,
                                          max_position_embeddings=ABSENT, pad_token_id=-1),
    "meta-llama/Llama-2-7b-hf": dict(LLAMA, _name_or_path="meta-llama/Llama-2-7b-hf"),
    "meta-llama/Llama-2-13b-chat-hf": dict(LLAMA, **B13),
    "meta-llama/Llama-2-70b-hf": dict(LLAMA, **B70),
    "togethercomputer/LLaMA-2-7B-32K": dict(LLAMA, max_position_embeddings=32768, rope_scaling=LINEAR_8),
    "NousResearch/Yarn-Llama-2-7b-64k": dict(
        LLAMA, rope_scaling=dict(factor=16.0, finetuned=True, original_max_position_embeddings=4096, type="yarn")),
    "meta-llama/Meta-Llama-3-8B": LLAMA_3,
    "meta-llama/Meta-Llama-3-8B-Instruct": dict(LLAMA_3, eos_token_id=128009),
    "meta-llama/Meta-Llama-3-70B-Instruct": dict(LLAMA_3, **B70, eos_token_id=128009),
    "meta-llama/Llama-3.1-8B": LLAMA_31,
    "meta-llama/Llama-3.1-8B-Instruct": dict(LLAMA_31, eos_token_id=ENDS_31),
    "meta-llama/Llama-3.1-405B": dict(LLAMA_31, hidden_size=16384, intermediate_size=53248, num_attention_heads=128,
                                      num_hidden_layers=126),
    "meta-llama/Llama-3.2-1B": LLAMA_32,
    "meta-llama/Llama-3.2-3B-Instruct": dict(LLAMA_32, eos_token_id=ENDS_31, head_dim=128, hidden_size=3072,
                                             num_attention_heads=24, num_hidden_layers=28),
    "meta-llama/Llama-3.3-70B-Instruct": dict(LLAMA_31, **B70, eos_token_id=ENDS_31),
    "codellama/CodeLlama-7b-hf": CODE_LLAMA,
    "codellama/CodeLlama-13b-Instruct-hf": dict(CODE_LLAMA, **B13),
    "codellama/CodeLlama-34b-Instruct-hf": dict(CODE_LLAMA, **CODE_34),
    "lmsys/vicuna-7b-v1.5": dict(LLAMA, _name_or_path="vicuna-7b-v1.5", pad_token_id=0),
    "lmsys/vicuna-13b-v1.5-16k": dict(LLAMA, **B13, max_sequence_length=16384, pad_token_id=0, rope_scaling=LINEAR_4),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": dict(
        LLAMA, attention_bias=False, hidden_size=2048, intermediate_size=5632, max_position_embeddings=2048,
        num_hidden_layers=22, num_key_value_heads=4, rope_theta=10000.0, torch_dtype="bfloat16"),
    "HuggingFaceTB/SmolLM-135M": SMOL,
    "HuggingFaceTB/SmolLM-360M-Instruct": dict(SMOL, bos_token_id=1, eos_token_id=2, hidden_size=960,
                                               intermediate_size=2560, num_attention_heads=15, num_hidden_layers=32,
                                               num_key_value_heads=5, pad_token_id=2),
    "HuggingFaceTB/SmolLM-1.7B": dict(SMOL, **SMOL_17),
    "HuggingFaceTB/SmolLM2-135M": SMOL_2,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {
        **SMOL_2, **SMOL_17, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "pad_token_id": 2,
        "rope_theta": 130000, "is_llama_config": ABSENT, "rope_interleaved": ABSENT,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}},
    "01-ai/Yi-6B": YI,
    "01-ai/Yi-34B-200K": dict(YI, hidden_size=7168, intermediate_size=20480, max_position_embeddings=200000,
                              num_attention_heads=56, num_hidden_layers=60, num_key_value_heads=8,
                              rope_theta=10000000.0),
    "01-ai/Yi-1.5-9B-Chat": dict(YI, attention_bias=False, attention_dropout=0.0, num_hidden_layers=48,
                                 rms_norm_eps=1e-06),
    "deepseek-ai/deepseek-llm-7b-base": DEEPSEEK,
    "deepseek-ai/deepseek-llm-67b-chat": dict(DEEPSEEK, hidden_size=8192, intermediate_size=22016,
                                              num_attention_heads=64, num_hidden_layers=95, num_key_value_heads=8),
    "deepseek-ai/deepseek-coder-1.3b-base": dict(DEEPSEEK_CODER, hidden_size=2048, intermediate_size=5504,
                                                 num_attention_heads=16, num_hidden_layers=24, num_key_value_heads=16),
    "deepseek-ai/deepseek-coder-6.7b-instruct": dict(DEEPSEEK_CODER, eos_token_id=32021),
    "deepseek-ai/deepseek-coder-33b-base": dict(DEEPSEEK_CODER, hidden_size=7168, intermediate_size=19200,
                                                num_attention_heads=56, num_hidden_layers=62, num_key_value_heads=8),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": dict(LLAMA_31, transformers_version="4.43.0.dev0"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": dict(QWEN_25, **QWEN_15, rope_theta=10000, sliding_window=4096),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": dict(QWEN_25, rope_theta=10000, sliding_window=4096,
                                                    transformers_version="4.44.0"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": dict(QWEN_25, **QWEN_32),
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.1": MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.2": dict(MISTRAL_2, transformers_version="4.36.0"),
    "mistralai/Mistral-7B-v0.3": dict(MISTRAL_2, vocab_size=32768),
    "mistralai/Mistral-Nemo-Base-2407": NEMO,
    "mistralai/Mistral-Nemo-Instruct-2407": dict(NEMO, max_position_embeddings=1024000),
    "mistralai/Mistral-Small-24B-Base-2501": dict(NEMO, intermediate_size=32768, max_position_embeddings=32768,
                                                  rope_theta=100000000.0),
    "mistralai/Ministral-8B-Instruct-2410": dict(NEMO, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
                                                 max_position_embeddings=32768, rope_theta=100000000.0,
                                                 sliding_window=32768),
    "HuggingFaceH4/zephyr-7b-beta": dict(MISTRAL, _name_or_path="HuggingFaceH4/mistral-7b-sft-beta", pad_token_id=2,
                                         transformers_version="4.35.0"),
    "teknium/OpenHermes-2.5-Mistral-7B": dict(MISTRAL, _name_or_path="mistralai/Mistral-7B-v0.1", eos_token_id=32000,
                                              use_cache=False, vocab_size=32002),
    "NousResearch/Nous-Hermes-llama-2-7b": dict(LLAMA, pad_token_id=0, torch_dtype="bfloat16"),
    "NousResearch/Hermes-2-Pro-Llama-3-8B": dict(LLAMA_3, eos_token_id=128003, vocab_size=128288),
    "NousResearch/Hermes-3-Llama-3.1-8B": dict(LLAMA_31, eos_token_id=128040),
    "Qwen/Qwen2-0.5B": dict(QWEN_2, **QWEN_HALF),
    "Qwen/Qwen2-7B-Instruct": dict(QWEN_2, eos_token_id=151645, max_position_embeddings=32768),
    "Qwen/Qwen2-72B": dict(QWEN_2, **B70, max_window_layers=80, rms_norm_eps=1e-05) | dict(intermediate_size=29568),
    "Qwen/Qwen2.5-0.5B-Instruct": dict(QWEN_25, **QWEN_HALF, eos_token_id=151645) | dict(max_window_layers=21),
    "Qwen/Qwen2.5-7B": QWEN_25,
    "Qwen/Qwen2.5-7B-Instruct, for long texts": dict(  # with what its card says to add
        QWEN_25, eos_token_id=151645, max_position_embeddings=32768,
        rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768, type="yarn")),
    "Qwen/Qwen2.5-Coder-32B-Instruct": dict(QWEN_25, **QWEN_32, eos_token_id=151645),
    "Qwen/Qwen2.5-Math-1.5B": dict(QWEN_25, **QWEN_15, max_position_embeddings=4096, rope_theta=10000.0,
                                   sliding_window=4096, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B-Instruct-1M": dict(
        QWEN_25, eos_token_id=151645, max_position_embeddings=1010000, rope_theta=10000000.0,
        dual_chunk_attention_config=dict(chunk_size=262144, local_size=8192,
                                         original_max_position_embeddings=262144)),
    "Qwen/QwQ-32B": dict(QWEN_25, **QWEN_32, eos_token_id=151645) | dict(max_position_embeddings=40960),
    "Qwen/Qwen3-0.6B": QWEN_3_06,
    "Qwen/Qwen3-4B-Instruct-2507": dict(QWEN_3, hidden_size=2560, intermediate_size=9728, rope_theta=5000000,
                                        max_position_embeddings=262144, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": QWEN_3,
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": dict(
        QWEN_3, max_position_embeddings=131072, rope_scaling=dict(
            attn_factor=0.8782488562869419, factor=4.0, original_max_position_embeddings=32768, rope_type="yarn")),
    "Qwen/Qwen3-32B": dict(QWEN_3, hidden_size=5120, intermediate_size=25600, max_window_layers=64,
                           num_attention_heads=64, num_hidden_layers=64),
    "Qwen/Qwen3-Embedding-0.6B": dict(QWEN_3_06, eos_token_id=151643, max_position_embeddings=32768,
                                      vocab_size=151669),
    "openai-community/gpt2": GPT_2,
    "openai-community/gpt2-xl": dict(GPT_2, n_embd=1600, n_head=25, n_layer=48, output_past=True),
    "allenai/OLMo-2-1124-7B": OLMO_2,
    "allenai/OLMo-2-0325-32B": dict(OLMO_2, hidden_size=5120, intermediate_size=27648, num_attention_heads=40,
                                    num_hidden_layers=64, num_key_value_heads=8),
    "microsoft/Phi-3-mini-4k-instruct": PHI_3,
    "microsoft/phi-4": dict(
        PHI_3, bos_token_id=100257, eos_token_id=100257, hidden_size=5120, intermediate_size=17920,
        max_position_embeddings=16384, num_attention_heads=40, num_hidden_layers=40, num_key_value_heads=10,
        original_max_position_embeddings=16384, pad_token_id=100257, rope_theta=250000, sliding_window=None,
        transformers_version="4.47.0", vocab_size=100352),
    "microsoft/Phi-4-mini-instruct": dict(
        PHI_3, bos_token_id=199999, eos_token_id=199999, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False,
        max_position_embeddings=131072, mlp_bias=False, num_attention_heads=24, num_key_value_heads=8,
        pad_token_id=199999, partial_rotary_factor=0.75, sliding_window=262144, tie_word_embeddings=True,
        rope_scaling=dict(long_factor=PHI_4_MINI, short_factor=[1.0] * 48, type="longrope"),
        transformers_version="4.45.0", vocab_size=200064),
    "facebook/layerskip-llama2-7B": dict(LLAMA, **LAYERSKIP),
    "facebook/layerskip-llama2-13B": dict(LLAMA, **B13, **LAYERSKIP),
    "facebook/layerskip-llama3-8B": LLAMA_3 | LAYERSKIP,
    "facebook/layerskip-codellama-34B": CODE_LLAMA | CODE_34 | LAYERSKIP,
    "facebook/layerskip-llama3.2-1B": LLAMA_32 | LAYERSKIP,
}

PUBLISHED |= {
    "mistralai/Mixtral-8x7B-v0.1": MIXTRAL,
    "Qwen/Qwen3-30B-A3B": QWEN_3_MOE,
    "openai/gpt-oss-20b": GPT_OSS,
    "openai/gpt-oss-120b": dict(GPT_OSS, num_hidden_layers=36, num_local_experts=128,
                                layer_types=["sliding_attention", "full_attention"] * 18),
    "google/gemma-2b": GEMMA,
    "google/gemma-7b": dict(GEMMA, hidden_activation=ABSENT, hidden_size=3072, intermediate_size=24576,
                            num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=16),
    "google/gemma-2-2b": GEMMA_2,
    "google/gemma-2-9b": dict(GEMMA_2, hidden_size=3584, intermediate_size=14336, num_attention_heads=16,
                              num_hidden_layers=42, num_key_value_heads=8),
    "google/gemma-2-27b": dict(GEMMA_2, head_dim=128, hidden_size=4608, intermediate_size=36864, num_attention_heads=32,
                               num_hidden_layers=46, num_key_value_heads=16, query_pre_attn_scalar=144),
    "google/gemma-3-270m": dict(GEMMA_3, eos_token_id=1, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
                                _sliding_window_pattern=6, sliding_window_pattern=ABSENT),
    "google/gemma-3-1b-it": GEMMA_3,
}

# Models with a decoder among other parts; sizes that their files leave out are those of the class.
HOLDERS = {
    "google/gemma-3-4b-it": dict(
        architectures=["Gemma3ForConditionalGeneration"], boi_token_index=255999, eoi_token_index=256000,
        eos_token_id=[1, 106], image_token_index=262144, initializer_range=0.02, mm_tokens_per_image=256,
        model_type="gemma3", torch_dtype="bfloat16", transformers_version="4.50.0.dev0", text_config=dict(
            hidden_size=2560, intermediate_size=10240, model_type="gemma3_text", num_hidden_layers=34,
            rope_scaling=LINEAR_ROPE_8, sliding_window=1024),
        vision_config=dict(hidden_size=1152, image_size=896, model_type="siglip_vision_model")),
    "google/gemma-3-27b-it": dict(
        architectures=["Gemma3ForConditionalGeneration"], eos_token_id=[1, 106], model_type="gemma3", text_config=dict(
            head_dim=128, hidden_size=5376, intermediate_size=21504, model_type="gemma3_text", num_attention_heads=32,
            num_hidden_layers=62, num_key_value_heads=16, query_pre_attn_scalar=168, rope_scaling=LINEAR_ROPE_8,
            sliding_window=1024), vision_config=dict(model_type="siglip_vision_model")),
}

# How many parameters the published weights have; of holders without their other parts.
COUNTS = {
    "google/gemma-2b": 2_506_172_416, "google/gemma-2-2b": 2_614_341_888, "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320, "google/gemma-3-270m": 268_098_176, "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-4b-it": 3_880_263_168, "google/gemma-3-27b-it": 27_009_346_304,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704, "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "openai/gpt-oss-20b": 20_914_757_184, "openai/gpt-oss-120b": 116_829_156_672,
    "openai-community/gpt2": 124_439_808, "openai-community/gpt2-xl": 1_557_611_200,
    "allenai/OLMo-2-1124-7B": 7_298_617_344, "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200, "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "Qwen/Qwen2.5-7B-Instruct, for long texts": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
}

# What a load says that it passes over.
PASSED_OVER = {
    "NousResearch/Yarn-Llama-2-7b-64k": ["finetuned (of the rotary positions)"],
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": ["attn_factor (of the rotary positions)"],
    "huggyllama/llama-7b": ["max_sequence_length"],
    "decapoda-research/llama-7b-hf": ["max_sequence_length"],
    "lmsys/vicuna-13b-v1.5-16k": ["max_sequence_length"],
    "HuggingFaceTB/SmolLM2-135M": ["is_llama_config"],
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ["transformers.js_config"],
    "Qwen/Qwen2.5-7B-Instruct-1M": ["dual_chunk_attention_config"],
    "Qwen/Qwen3-30B-A3B": ["max_window_layers"],
    "openai-community/gpt2-xl": ["output_past"],
    "microsoft/Phi-4-mini-instruct": ["full_attn_mod", "interpolate_factor"],
    "openai/gpt-oss-20b": ["experts_per_token", "initial_context_length"],
    "openai/gpt-oss-120b": ["experts_per_token", "initial_context_length"],
}

# Published, and refused: the file, and what the error says.
REFUSED = {
    "Alibaba-NLP/gte-Qwen2-1.5B-instruct": (dict(QWEN_2, **QWEN_15, is_causal=False), "'is_causal' is False"),
    "Qwen/Qwen2.5-7B-Instruct-AWQ": (
        dict(QWEN_25, eos_token_id=151645, quantization_config=dict(
            bits=4, group_size=128, modules_to_not_convert=None, quant_method="awq", version="gemm", zero_point=True)),
        "'quantization_config' is"),
    "Qwen/Qwen3-8B-FP8": (
        dict(QWEN_3, quantization_config=dict(activation_scheme="dynamic", fmt="e4m3", quant_method="fp8",
                                              weight_block_size=[128, 128])), "'quantization_config' is"),
    "Qwen/Qwen3-30B-A3B-FP8": (dict(QWEN_3_MOE, quantization_config=dict(
        activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128])),
        "'quantization_config' is"),
    "openai/gpt-oss-20b in another form": (dict(GPT_OSS, quantization_config=dict(quant_method="bitsandbytes")),
                                           "'quantization_config' is .* only 'mxfp4' is read"),
    "HuggingFaceTB/SmolLM3-3B": (dict(SMOL, architectures=["SmolLM3ForCausalLM"], model_type="smollm3"),
                                 "model_type 'smollm3'"),
    "deepseek-ai/DeepSeek-V2-Lite": (dict(DEEPSEEK, architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2"),
                                     "model_type 'deepseek_v2'"),
}
