"""What the supervisor's interpreter must not load: it is copied into every child (ARCHITECTURE §1)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FORBIDDEN = {
    "asyncio",
    "grpc",
    "google",
    "pyroute2",
    "aiohttp",
    "msgspec",
    "threading",
    "ast",
    "subprocess",
    "logging",
    "ssl",
    "cri",
}


def test_neither_heavy_nor_foreign_modules() -> None:
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); import shim.supervisor.boot as b; "
        "sys.modules['inspect'] = b._Inspect('inspect'); import shim.supervisor.main as m; m.warm_up(); "
        "import json; print(json.dumps([[n, getattr(x, '__file__', None)] for n, x in sys.modules.items()]))"
    )
    output = subprocess.run([sys.executable, "-I", "-S", "-X", "utf8", "-c", code], check=True, capture_output=True, text=True).stdout
    modules = dict(json.loads(output))
    assert not FORBIDDEN & {name.partition(".")[0] for name in modules}
    assert modules["inspect"] is None  # boot's stand-in
    outside = {name for name, file in modules.items() if file and "site-packages" in file}
    assert not outside
