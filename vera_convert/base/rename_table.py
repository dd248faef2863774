"""How transformers calls the layers of a model in memory where its files call them otherwise.

A family is a group of model types whose names changed together in one release. Its table gives the
parts of a path that changed, as they stand in the files and as they stand in memory since then; #
is the number of a layer, ^ the beginning of the path. From top to bottom, files to memory.

Only plain renamings are here. What is also cut, stacked or reordered is in `layouts`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """Model types whose layers were renamed together.

    Attributes:
        name: how output and messages call it.
        since: the release of transformers that brought the names in memory.
        types: the ``model_type`` of the config, or of a part of it, that it holds for.
        steps: parts of a path in the files and in memory, applied in order.
        tolerated: further forms that files have, and what they mean; nothing is ever renamed to
            them.
        is_optional: whether some classes of these types keep the files' names.
    """

    name: str
    since: str
    types: frozenset[str]
    steps: tuple[tuple[str, str], ...]
    tolerated: tuple[tuple[str, str], ...] = ()
    is_optional: bool = False


def _steps(table: str) -> tuple[tuple[str, str], ...]:
    pairs = (line.split() for line in table.splitlines() if line.strip())
    return tuple((files, memory) for files, memory in pairs)


def _family(
    name: str, since: str, types: str, table: str, *, tolerated: str = "", is_optional: bool = False
) -> Family:
    return Family(
        name, since, frozenset(types.split()), _steps(table), _steps(tolerated), is_optional
    )


# --- models of several parts ---------------------------------------------------------------------

_TEXT_MODEL_OF_QWEN = """
    ^model.layers                       ^model.language_model.layers
    ^model.embed_tokens                 ^model.language_model.embed_tokens
    ^model.norm                         ^model.language_model.norm
"""
_LLAVA_TYPES = """
    aria aya_vision fuyu gemma3 got_ocr2 internvl llava llava_next llava_next_video llava_onevision
    mistral3 mllama paligemma pp_chart2table video_llava vipllava
"""
WITH_CLIP_TOWER = frozenset(
    """
    aya_vision gemma3 llava llava_next llava_next_video llava_onevision paligemma video_llava
    vipllava
    """.split()  # noqa: SIM905 - words read best as a text
)
"""Types whose vision tower is CLIP's or SigLIP's where the config does not say which it is."""

_WHOLE_MODELS = (
    _family(
        "Llava",
        "4.52",
        _LLAVA_TYPES,
        """
        ^language_model.lm_head         ^lm_head
        ^language_model.model           ^model.language_model
        ^vision_tower                   ^model.vision_tower
        ^image_tower                    ^model.image_tower
        ^video_tower                    ^model.video_tower
        ^vision_model                   ^model.vision_model
        ^vision_embed_tokens            ^model.vision_embed_tokens
        ^multi_modal_projector          ^model.multi_modal_projector
        """,
        tolerated="""
        ^language_model                 ^model.language_model
        ^model.language_model.model     ^model.language_model
        """,
    ),
    _family(
        "Qwen2-Audio",
        "5",
        """
        audioflamingo3 glmasr granite_speech granite_speech_plus musicflamingo qwen2_audio
        vibevoice_asr voxtral voxtral_realtime
        """,
        """
        ^language_model.lm_head         ^lm_head
        ^language_model.model           ^model.language_model
        ^audio_tower                    ^model.audio_tower
        ^multi_modal_projector          ^model.multi_modal_projector
        ^encoder                        ^model.encoder
        ^projector                      ^model.projector
        ^acoustic_tokenizer_encoder     ^model.acoustic_tokenizer_encoder
        ^semantic_tokenizer_encoder     ^model.semantic_tokenizer_encoder
        """,
        # transformers 5.10 to 5.23 saved one "model." too many.
        tolerated="""
        ^language_model                 ^model.language_model
        ^model.language_model.model     ^model.language_model
        """,
    ),
    _family(
        "Qwen2-VL",
        "4.52",
        "qwen2_vl qwen2_5_vl",
        f"""
        ^visual                         ^model.visual
        {_TEXT_MODEL_OF_QWEN}
        """,
    ),
    _family(
        "PaddleOCR-VL",
        "5",
        "paddleocr_vl",
        f"""
        ^mlp_AR                         ^model.projector
        ^visual                         ^model.visual
        {_TEXT_MODEL_OF_QWEN}
        """,
    ),
    _family(
        "Qwen-Omni",
        "5",
        "qwen2_5_omni qwen3_omni_moe",
        """
        ^thinker.audio_tower            ^thinker.model.audio_tower
        ^thinker.visual                 ^thinker.model.visual
        ^thinker.model.layers           ^thinker.model.language_model.layers
        ^thinker.model.embed_tokens     ^thinker.model.language_model.embed_tokens
        ^thinker.model.norm             ^thinker.model.language_model.norm
        """,
    ),
    _family(
        "Qwen-Omni thinker",
        "5",
        "qwen2_5_omni_thinker qwen3_omni_moe_thinker",
        f"""
        ^audio_tower                    ^model.audio_tower
        ^visual                         ^model.visual
        {_TEXT_MODEL_OF_QWEN}
        """,
    ),
    _family(
        "Emu3",
        "4.52",
        "emu3",
        """
        ^text_model.lm_head             ^lm_head
        ^text_model.model               ^model.text_model
        ^vqmodel                        ^model.vqmodel
        """,
    ),
    _family(
        "ShieldGemma 2",
        "4.52",
        "shieldgemma2",
        """
        ^language_model.lm_head         ^model.lm_head
        ^language_model.model           ^model.model.language_model
        ^vision_tower                   ^model.model.vision_tower
        ^multi_modal_projector          ^model.model.multi_modal_projector
        """,
        tolerated="""
        ^model.language_model.lm_head   ^model.lm_head
        ^model.language_model.model     ^model.model.language_model
        ^model.vision_tower             ^model.model.vision_tower
        ^model.multi_modal_projector    ^model.model.multi_modal_projector
        ^model.model.language_model.model  ^model.model.language_model
        """,
    ),
    _family(
        "ColPali",
        "4.52",
        "colpali",
        """
        ^vlm.language_model.lm_head     ^vlm.lm_head
        ^vlm.language_model.model       ^vlm.model.language_model
        ^vlm.vision_tower               ^vlm.model.vision_tower
        ^vlm.multi_modal_projector      ^vlm.model.multi_modal_projector
        """,
    ),
    _family(
        "ColPali and ColQwen2",
        "5",
        "colpali colqwen2",
        """
        ^vlm.model.language_model       ^vlm.language_model
        ^vlm.model.multi_modal_projector  ^vlm.multi_modal_projector
        ^vlm.model.vision_tower         ^vlm.vision_tower
        ^vlm.model.visual               ^vlm.visual
        """,
    ),
    _family(
        "HyperCLOVA X Vision",
        "5",
        "hyperclovax_vision_v2",
        """
        ^model.language_model.lm_head   ^lm_head
        ^model.language_model.model     ^model.language_model
        ^model.vision_projector         ^model.projector
        """,
    ),
    _family(
        "HunYuan-VL",
        "5",
        "hunyuan_vl hy_v4_vl",
        f"""
        mlp.dense_h_to_4h               mlp.fc1
        mlp.dense_4h_to_h               mlp.fc2
        ^vit                            ^model.vision_tower
        {_TEXT_MODEL_OF_QWEN}
        """,
    ),
    _family(
        "a text model taken out of a larger one",
        "4.52",
        """
        apertus1p5_text gemma3 gemma3n_text qwen3_5_moe_text qwen3_5_text qwen4_exp_text
        """,
        """
        ^model.language_model           ^model
        """,
        is_optional=True,
    ),
)

# --- vision --------------------------------------------------------------------------------------

_SPLIT_ATTENTION = """
    attention.attention.query           attention.q_proj
    attention.attention.key             attention.k_proj
    attention.attention.value           attention.v_proj
"""
_DETR = """
    backbone.conv_encoder               backbone
    self_attn.out_proj                  self_attn.o_proj
    encoder_attn.out_proj               encoder_attn.o_proj
    layers.#.fc1                        layers.#.mlp.fc1
    layers.#.fc2                        layers.#.mlp.fc2
"""

_VISION = (
    _family(
        "ZoeDepth",
        "5",
        "zoedepth",
        """
        ^backbone.encoder.layer         ^backbone.beit.encoder.layer
        """,
    ),
    _family(
        "ViT",
        "5",
        "audio-spectrogram-transformer beit deit ijepa pixio vit vit_mae vit_msn vivit",
        """
        encoder.layer.#.attention.attention.query   layers.#.attention.q_proj
        encoder.layer.#.attention.attention.key     layers.#.attention.k_proj
        encoder.layer.#.attention.attention.value   layers.#.attention.v_proj
        encoder.layer.#.attention.output.dense      layers.#.attention.o_proj
        encoder.layer.#.intermediate.dense          layers.#.mlp.fc1
        encoder.layer.#.output.dense                layers.#.mlp.fc2
        encoder.layer.#.layernorm_before            layers.#.layernorm_before
        encoder.layer.#.layernorm_after             layers.#.layernorm_after
        decoder_layers.#.attention.attention.query  decoder_layers.#.attention.q_proj
        decoder_layers.#.attention.attention.key    decoder_layers.#.attention.k_proj
        decoder_layers.#.attention.attention.value  decoder_layers.#.attention.v_proj
        decoder_layers.#.attention.output.dense     decoder_layers.#.attention.o_proj
        decoder_layers.#.intermediate.dense         decoder_layers.#.mlp.fc1
        decoder_layers.#.output.dense               decoder_layers.#.mlp.fc2
        """,
        # What transformers 5 saves of ViTMAE's decoder.
        tolerated="""
        decoder_encoder.layer.#.attention.attention.query  decoder_layers.#.attention.q_proj
        decoder_encoder.layer.#.attention.attention.key    decoder_layers.#.attention.k_proj
        decoder_encoder.layer.#.attention.attention.value  decoder_layers.#.attention.v_proj
        decoder_encoder.layer.#.attention.output.dense     decoder_layers.#.attention.o_proj
        decoder_encoder.layer.#.intermediate.dense         decoder_layers.#.mlp.fc1
        decoder_encoder.layer.#.output.dense               decoder_layers.#.mlp.fc2
        """,
    ),
    _family(
        "DINOv2",
        "5",
        "dinov2 dinov2_with_registers",
        f"""
        {_SPLIT_ATTENTION}
        attention.output.dense          attention.o_proj
        mlp.weights_out                 mlp.down_proj
        """,
    ),
    _family(
        "LW-DETR",
        "5",
        "lw_detr",
        f"""
        {_SPLIT_ATTENTION}
        attention.output                attention.o_proj
        """,
    ),
    _family("DINOv3", "5", "dinov3_convnext", "^stages  ^model.stages"),
    _family("DINOv3", "5", "dinov3_vit", "^layer  ^model.layer"),
    _family("DINOv3 backbone", "5", "chmv2", "^backbone.layer  ^backbone.model.layer"),
    _family(
        "Swin backbone",
        "5",
        "grounding-dino mask2former mm-grounding-dino oneformer upernet",
        """
        encoder.layers.#.blocks         swin.encoder.layers.#.blocks
        encoder.layers.#.downsample     swin.encoder.layers.#.downsample
        """,
    ),
    _family(
        "Swin",
        "5",
        "swin",
        """
        blocks.#.attention.self.query   blocks.#.attention.q_proj
        blocks.#.attention.self.key     blocks.#.attention.k_proj
        blocks.#.attention.self.value   blocks.#.attention.v_proj
        blocks.#.attention.output.dense blocks.#.attention.o_proj
        blocks.#.intermediate.dense     blocks.#.mlp.fc1
        blocks.#.output.dense           blocks.#.mlp.fc2
        """,
    ),
    _family(
        "SegFormer",
        "5",
        "segformer",
        """
        encoder.block.#.#               stages.#.blocks.#
        encoder.patch_embeddings.#      stages.#.patch_embeddings
        encoder.layer_norm.#            stages.#.layer_norm
        attention.self.query            attention.q_proj
        attention.self.key              attention.k_proj
        attention.self.value            attention.v_proj
        attention.output.dense          attention.o_proj
        mlp.dense1                      mlp.fc1
        mlp.dense2                      mlp.fc2
        decode_head.linear_c            decode_head.linear_projections
        """,
    ),
    _family("DETR", "5", "conditional_detr deformable_detr detr maskformer", _DETR),
    _family(
        "Conditional DETR",
        "5",
        "conditional_detr",
        """
        decoder.layers.#.sa_qcontent_proj   decoder.layers.#.self_attn.q_content_proj
        decoder.layers.#.sa_qpos_proj       decoder.layers.#.self_attn.q_pos_proj
        decoder.layers.#.sa_kcontent_proj   decoder.layers.#.self_attn.k_content_proj
        decoder.layers.#.sa_kpos_proj       decoder.layers.#.self_attn.k_pos_proj
        decoder.layers.#.sa_v_proj          decoder.layers.#.self_attn.v_proj
        decoder.layers.#.ca_qcontent_proj   decoder.layers.#.encoder_attn.q_content_proj
        decoder.layers.#.ca_qpos_proj       decoder.layers.#.encoder_attn.q_pos_proj
        decoder.layers.#.ca_kcontent_proj   decoder.layers.#.encoder_attn.k_content_proj
        decoder.layers.#.ca_kpos_proj       decoder.layers.#.encoder_attn.k_pos_proj
        decoder.layers.#.ca_v_proj          decoder.layers.#.encoder_attn.v_proj
        decoder.layers.#.ca_qpos_sine_proj  decoder.layers.#.encoder_attn.q_pos_sine_proj
        """,
    ),
    _family(
        "RT-DETR",
        "5",
        "pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4 rt_detr rt_detr_v2",
        """
        self_attn.out_proj              self_attn.o_proj
        layers.#.fc1                    layers.#.mlp.fc1
        layers.#.fc2                    layers.#.mlp.fc2
        encoder.encoder.#.layers        encoder.aifi.#.layers
        """,
    ),
    _family(
        "PP-DocLayout",
        "5",
        "pp_doclayout_v4",
        """
        decoder_order_head              decoder.relative_order_head.proj
        decoder_global_pointer          decoder.relative_order_head.global_pointer
        decoder_roor_order_head         decoder.successor_order_head.proj
        decoder_roor_global_pointer     decoder.successor_order_head.global_pointer
        """,
    ),
    # The towers come last: what stands before them may be renamed by the model around them.
    _family(
        "CLIP tower",
        "5",
        """
        altclip_vision_model chinese_clip_vision_model clip_text_model clip_vision_model
        clipseg_text_model clipseg_vision_model metaclip_2_text_model metaclip_2_vision_model mlcd
        mlcd_vision siglip2_text_model siglip2_vision_model siglip_text_model siglip_vision_model
        xclip_text_model xclip_vision_model
        """,
        """
        vision_tower.vision_model       vision_tower
        image_tower.vision_model        image_tower
        video_tower.vision_model        video_tower
        text_encoder.text_model         text_encoder
        """,
    ),
    _family(
        "SigLIP tower",
        "5",
        "colmodernvbert deepseek_vl deepseek_vl_hybrid modernvbert",
        """
        vision_model.vision_model       vision_model
        """,
    ),
)

# --- text and the rest ---------------------------------------------------------------------------

_TEXT = (
    _family("GPT-NeoX", "5", "gpt_neox", "^embed_out  ^lm_head"),
    _family("Nemotron-H", "5", "nemotron_h", "^backbone  ^model"),
    _family(
        "Mixtral",
        "5",
        "kimi_linear minimax minimax_m2 mixtral",
        """
        block_sparse_moe                mlp
        """,
    ),
    _family("PhiMoE", "5", "phimoe", "block_sparse_moe.gate  mlp.router"),
    _family(
        "Kimi Linear",
        "5",
        "glm5_next glm5_next_text kimi_linear",
        """
        self_attn.f_a_proj              self_attn.forget_gate.f_a_proj
        self_attn.f_b_proj              self_attn.forget_gate.f_b_proj
        """,
    ),
    _family(
        "EXAONE",
        "5",
        "exaone",
        """
        ^transformer.wte                ^model.embed_tokens
        ^transformer.h                  ^model.layers
        ^transformer.ln_f               ^model.norm
        attn.attention                  self_attn
        self_attn.out_proj              self_attn.o_proj
        ln_1                            input_layernorm
        ln_2                            post_attention_layernorm
        mlp.c_fc_0                      mlp.gate_proj
        mlp.c_fc_1                      mlp.up_proj
        mlp.c_proj                      mlp.down_proj
        """,
    ),
    _family(
        "A.X-K2",
        "5",
        "axk2",
        """
        W_down                          mlp.fc1
        W_up                            mlp.fc2
        self_attn.q_b_proj              self_attn.q_gate_proj
        """,
    ),
    _family(
        "Bailing",
        "5",
        "bailing_hybrid",
        """
        ^model.word_embeddings          ^model.embed_tokens
        layers.#.attention              layers.#.self_attn
        self_attn.f_proj                self_attn.forget_gate.f_proj
        self_attn.dense                 self_attn.o_proj
        """,
    ),
    _family("Hy3", "5", "hy_v3", "mlp.shared_mlp  mlp.shared_experts"),
    _family("Hy4", "5", "hy_v4 hy_v4_vl_text", "linear_gate  gate_proj"),
    _family("Laguna", "5", "laguna", "mlp.shared_expert  mlp.shared_experts"),
    _family("LFM3-VL", "5", "lfm3_vl_vision", "patchifier  patch_embed"),
    _family("TimesFM", "5", "timesfm2_5", "mlp.ff0  mlp.fc1\nmlp.ff1  mlp.fc2"),
)

FAMILIES = (*_WHOLE_MODELS, *_VISION, *_TEXT)
"""Every family: those of a whole model before those of its parts."""
