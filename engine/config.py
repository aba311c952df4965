"""The engine's settings: one frozen record, validated once."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from engine.errors import InvalidConfig

PrecisionSetting = Literal["auto", "fp32", "int8", "fp16", "bf16"]
KVPrecision = Literal["auto", "int8"]
KernelFusion = Literal["auto", "on", "off"]

_DEVICE = re.compile(r"auto|cpu|cuda(?::([0-9]{1,3}(?:,[0-9]{1,3})*))?")
_TOKEN = re.compile(r"[!-~]{0,512}")  # what a header can hold
_SHARE = (0.05, 0.95)  # of a GPU's free memory
_GPU_MIB = (256, 1 << 20)
_GPU_PRECISIONS = ("fp16", "bf16")

_LIMITS: dict[str, tuple[float, float]] = {
    "max_batch_size": (1, 1024),
    "max_waiting": (0, 100_000),
    "kv_cache_mib": (1, 1 << 20),
    "prefill_chunk": (0, 8192),
    "max_image_megapixels": (0.001, 10_000),
    "max_image_mib": (1, 256),
    "max_images": (1, 10_000),
    "max_video_tokens": (64, 1 << 20),
    "answer_cache_mib": (1, 1 << 20),
    "feature_cache_mib": (1, 1 << 20),
    "cache_expiry_hours": (0.001, 24 * 3650),
    "request_timeout_s": (0.1, 86_400),
    "download_wait_s": (0, 600),
    "idle_unload_minutes": (0, 1 << 20),
    "threads": (0, 1024),
    "metrics_port": (0, 65535),
    "preprocess_workers": (0, 64),
}


def default_storage() -> Path:
    """Where weights and caches live unless the form names a folder: outside the plugin's own, so upgrades keep it.

    Plugins inherit the daemon's environment. PLUGIN_WORKING_PATH is where it unpacks them, /app/storage/cwd in Dify's
    containers: beside it is the persistent volume, which the home folder is not on.
    """
    plugins = Path(os.environ.get("PLUGIN_WORKING_PATH", ""))
    if plugins.is_absolute():
        return plugins.parent / "tessera"
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "tessera"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises InvalidConfig on construction, naming the setting, its value and the allowed range."""

    storage: Path = dataclasses.field(default_factory=default_storage)
    device: str = "auto"  # auto, cpu, cuda (the first GPU that works), or GPUs by number: cuda:0,2
    precision: PrecisionSetting = "auto"
    gpu_memory: float = 0.85  # for weights, KV and workspace: up to 0.95 a share of what is free, from 256 on MiB
    kv_precision: KVPrecision = "auto"  # on a GPU; int8 holds twice the tokens
    kernel_fusion: KernelFusion = "auto"  # on a GPU; operators of our own instead of ONNX Runtime's
    max_batch_size: int = 32  # sequences that decode together
    max_waiting: int = 256  # requests accepted beyond those
    kv_cache_mib: int = 1024  # on the CPU
    prefill_chunk: int = 0  # tokens of prompts that one step computes; 0 = 256 on the CPU, 1024 on a GPU
    max_image_megapixels: float = 50.0
    max_image_mib: int = 20  # of a file that is fetched from a URL
    allow_private_images: bool = False  # whether such a URL may lead to a private or loopback address
    max_images: int = 64  # per request, videos among them
    max_video_tokens: int = 8192  # that one video may fill; its frames are made smaller until they fit
    cache_enabled: bool = True
    answer_cache_mib: int = 256
    feature_cache_mib: int = 1024
    cache_expiry_hours: float = 24 * 7
    request_timeout_s: float = 540.0  # below the 600 s at which Dify gives up
    # Long enough that nobody at work waits for a model twice, short enough that a night's GPU is free for others.
    idle_unload_minutes: float = 30.0  # 0 = never
    threads: int = 0  # ONNX Runtime's intra-op threads; 0 = one for a small model, every core for a large one
    preprocess_workers: int = 0  # threads that decode images; 0 = one for each two cores, two at most
    metrics_port: int = 0  # of 127.0.0.1, for Prometheus and `./tessera top`; 0 = off
    hub_endpoint: str = "https://huggingface.co"  # a mirror, ModelScope ("modelscope" in the address), or off
    hub_token: str = dataclasses.field(default="", repr=False)  # a secret: no message may quote it
    download_wait_s: float = 20.0  # how long a request waits for a model that is being downloaded

    def __post_init__(self) -> None:
        if not isinstance(self.storage, Path) or not self.storage.is_absolute():
            raise InvalidConfig(f"storage is {str(self.storage)!r}; give an absolute path of a folder")
        _require_device(self.device)
        _require_choice("precision", self.precision, get_args(PrecisionSetting))
        _require_choice("kv_precision", self.kv_precision, get_args(KVPrecision))
        _require_choice("kernel_fusion", self.kernel_fusion, get_args(KernelFusion))
        if self.device == "cpu":
            require_cpu_precision(self.precision)
        for name in ("cache_enabled", "allow_private_images"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidConfig(f"{name} is {getattr(self, name)!r}; it must be true or false")
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            _require_number(name, value)
            if not low <= value <= high:
                raise InvalidConfig(f"{name} is {value}; it must be between {low} and {high}")
        _require_gpu_memory(self.gpu_memory)
        _require_endpoint(self.hub_endpoint)
        _require_token(self.hub_token)

    @property
    def cuda_indices(self) -> tuple[int, ...]:
        """The GPUs that `device` numbers; empty when it leaves the choice open."""
        return _indices(self.device)

    @property
    def preparing_threads(self) -> int:
        """Threads for images, and as many for videos: more than cores have time for only take it from the model."""
        return self.preprocess_workers or max(1, min(2, len(os.sched_getaffinity(0)) // 2))

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """Build from a form's or a command line's values (text is parsed; missing or empty means the default).

        Raises InvalidConfig for an unknown name or a value that does not parse.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for name, value in settings.items():
            if name not in fields:
                raise InvalidConfig(f"unknown setting {name!r}; known settings: {', '.join(sorted(fields))}")
            if value is None or (isinstance(value, str) and not value.strip()):
                continue
            values[name] = _parse(name, str(fields[name].type), value)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, `from_mapping`'s inverse."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidConfig(f"{name} is {value!r}; it must be a number")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidConfig(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def require_cpu_precision(precision: str, why: str = "") -> None:
    """The CPU's operators compute in fp32 and int8. Raises InvalidConfig; `why` says why it is to be the CPU."""
    if precision in _GPU_PRECISIONS:
        because = f", and {why}" if why else ""
        raise InvalidConfig(f"precision {precision} needs a CUDA device{because}; choose int8 or fp32")


def _require_device(device: object) -> None:
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise InvalidConfig(
            f"device is {device!r}; write auto, cpu, cuda, or GPUs by number, such as cuda:0 or cuda:0,2"
        )
    indices = _indices(device)
    if len(indices) != len(set(indices)):
        raise InvalidConfig(f"device is {device!r}; it names a GPU twice")


def _indices(device: str) -> tuple[int, ...]:
    return tuple(int(index) for index in device.removeprefix("cuda:").split(",")) if ":" in device else ()


def _require_gpu_memory(value: float) -> None:
    _require_number("gpu_memory", value)
    if not any(low <= value <= high for low, high in (_SHARE, _GPU_MIB)):
        raise InvalidConfig(
            f"gpu_memory is {value}; give a share of the free memory between {_SHARE[0]} and {_SHARE[1]},"
            f" or MiB from {_GPU_MIB[0]} to {_GPU_MIB[1]}"
        )


def _require_endpoint(endpoint: object) -> None:
    """An address without user, query or fragment, which would end up in messages and in file addresses."""
    if endpoint == "off":
        return
    if isinstance(endpoint, str) and "@" in endpoint:  # not quoted: it may hold a secret
        raise InvalidConfig("hub_endpoint must not hold a user or password; put the token into hub_token")
    try:
        parts = urlsplit(endpoint if isinstance(endpoint, str) else "")
        _ = parts.port  # raises for one that is no number
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InvalidConfig(
            f"hub_endpoint is {endpoint!r}; give an address such as https://huggingface.co or https://modelscope.cn,"
            " or off"
        )


def _require_token(token: object) -> None:
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise InvalidConfig(
            "hub_token has a character that no token has (a space or a line break, perhaps); copy it again"
        )


def _parse(name: str, kind: str, value: Any) -> Any:
    if kind == "Path":
        return Path(str(value)).expanduser()
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
    except ValueError:
        raise InvalidConfig(f"{name} is {value!r}; it must be a number") from None
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise InvalidConfig(f"{name} is {value!r}; it must be true or false")
        return text.lower() == "true"
    return text
