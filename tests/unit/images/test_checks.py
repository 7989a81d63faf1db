import json
import os
from pathlib import Path

from cri.config import Images
from cri.images import checks


def test_what_doctor_says_of_images(tmp_path: Path) -> None:
    policy, auth = tmp_path / "policy.json", tmp_path / "auth.json"
    assert list(checks.examine(Images())) == []
    settings = Images(signature_policy=str(policy), auth_file=str(auth), additional_stores=(str(tmp_path / "store"),))
    found = [(check, level) for check, level, _, _ in checks.examine(settings)]
    assert found == [("signatures", "fail"), ("credentials", "note"), ("image store", "fail")]
    policy.write_text('{"default": [{"type": "reject"}], "transports": {"docker": {"reg.example": [{"type": "reject"}]}}}')
    auth.write_text(json.dumps({"auths": {"a": {}}, "credsStore": "missing-here"}))
    os.chmod(auth, 0o644)
    lines = list(checks.examine(settings))
    assert lines[0] == ("signatures", "ok", f"{policy}: 1 scopes of registries, 0 keys", "")
    assert [line[1] for line in lines[1:4]] == ["ok", "note", "fail"] and lines[2][3] == f"chmod 600 {auth}"
    assert "docker-credential-missing-here" in lines[3][2]
    auth.write_text("{")
    assert next(line for line in checks.examine(settings) if line[0] == "credentials")[1] == "fail"
