"""Every endpoint of SGLang's HTTP server, and what the router does with it: one table.

    pair     served by a prefill and a decode server together (`router.request.serving`)
    any      one server's answer is everybody's; who is up is asked first
    each     the answers of all servers, by URL
    every    every server must do it; 200 only if all of them have
    own      the router answers for itself
    refused  404 with the reason, in the shape of the endpoint's clients

A test reads SGLang's sources (every supported version) and fails for a route that is not here.
"""

from __future__ import annotations

from typing import NamedTuple

PAIR, ANY, EACH, EVERY, OWN, REFUSED = "pair", "any", "each", "every", "own", "refused"
GET, POST, BOTH = ("GET",), ("POST",), ("GET", "POST")
WEBSOCKET = ("WEBSOCKET",)

_NOT_GENERATED = "SGLang computes it in one forward pass and cannot over a prefill/decode pair"
_CHAT = "its server keeps state or translates; use /v1/chat/completions"
_SESSION = (
    "prefill would know a session's last answer by its first token only; send the whole prompt: "
    "its beginning is found in the prefix cache"
)
_PER_SERVER = "it differs from server to server; call that server itself"


class Endpoint(NamedTuple):
    """`why`: the reason of a refusal, for its client."""

    path: str
    methods: tuple[str, ...]
    kind: str
    why: str = ""


def _all(kind: str, methods: tuple[str, ...], paths: str, why: str = "") -> list[Endpoint]:
    return [Endpoint(path, methods, kind, why) for path in paths.split()]


ENDPOINTS: tuple[Endpoint, ...] = (
    *_all(PAIR, ("POST", "PUT"), "/generate /v1/completions /v1/chat/completions"),
    *_all(OWN, GET, "/ /health /health_generate /ping /ready /metrics"),
    *_all(OWN, GET, "/server_info /get_server_info"),
    *_all(ANY, GET, "/v1/models /v1/models/{model:path} /model_info /get_model_info"),
    *_all(ANY, GET, "/weight_version /get_weight_version /api/tags"),
    *_all(ANY, POST, "/tokenize /v1/tokenize /detokenize /v1/detokenize /api/show"),
    *_all(ANY, POST, "/parse_function_call /separate_reasoning /v1/messages/count_tokens"),
    *_all(ANY, BOTH, "/get_weights_by_name"),
    *_all(EACH, GET, "/v1/loads /get_load /list_external_corpora /is_scaling_elastic_ep"),
    *_all(EACH, GET, "/hicache/storage-backend /get_hicache_l3_cache_layout"),
    *_all(EACH, GET, "/remote_instance_transfer_engine_info"),
    *_all(EACH, GET, "/get_remote_instance_transfer_engine_info"),
    *_all(EVERY, BOTH, "/flush_cache /start_profile /stop_profile /set_trace_level /freeze_gc"),
    *_all(EVERY, BOTH, "/start_expert_distribution_record /stop_expert_distribution_record"),
    *_all(EVERY, BOTH, "/dump_expert_distribution_record /configure_logging /slow_down"),
    *_all(EVERY, BOTH, "/release_memory_occupation /resume_memory_occupation /weights_checker"),
    *_all(EVERY, BOTH, "/clear_hicache_storage_backend"),
    *_all(EVERY, POST, "/abort_request /pause_generation /continue_generation"),
    *_all(EVERY, POST, "/init_weights_update_group /destroy_weights_update_group"),
    *_all(EVERY, POST, "/update_weights_from_disk /update_weights_from_tensor"),
    *_all(EVERY, POST, "/update_weights_from_distributed /update_weights_from_ipc"),
    *_all(EVERY, POST, "/begin_weight_update /end_weight_update /update_weight_version"),
    *_all(EVERY, POST, "/load_lora_adapter /load_lora_adapter_from_tensors /unload_lora_adapter"),
    *_all(EVERY, POST, "/add_external_corpus /remove_external_corpus /dumper/{method}"),
    *_all(EVERY, POST, "/hicache/storage-backend/clear"),
    *_all(EVERY, ("PUT", "DELETE"), "/hicache/storage-backend"),
    *_all(EVERY, ("POST", "PUT"), "/set_internal_state"),
    *_all(REFUSED, POST, "/init_weights_send_group_for_remote_instance", _PER_SERVER),
    *_all(REFUSED, POST, "/send_weights_to_remote_instance /scale_elastic_ep", _PER_SERVER),
    *_all(REFUSED, POST, "/pd_role_switch", _PER_SERVER + ", then move it by /admin/servers"),
    *_all(REFUSED, BOTH, "/open_session /close_session", _SESSION),
    *_all(REFUSED, ("POST", "PUT"), "/encode /classify /v1/rerank", _NOT_GENERATED),
    *_all(REFUSED, POST, "/v1/embeddings /v1/classify /v1/score", _NOT_GENERATED),
    *_all(REFUSED, POST, "/v1/decisions /v1/systemone", _NOT_GENERATED),
    *_all(REFUSED, POST, "/v1/responses /v1/messages /api/chat /api/generate", _CHAT),
    *_all(REFUSED, GET, "/v1/responses/{response_id}", _CHAT),
    *_all(REFUSED, POST, "/v1/responses/{response_id}/cancel", _CHAT),
    *_all(REFUSED, POST, "/invocations /vertex_generate", "use /generate or /v1/…"),
    *_all(REFUSED, POST, "/v1/audio/transcriptions", "audio has no prefill/decode form here"),
    *_all(REFUSED, WEBSOCKET, "/v1/realtime", "audio has no prefill/decode form here"),
)
