import pytest
from hypothesis import given
from hypothesis import strategies as st

from cri.images import reference
from cri.images.reference import BadReference, parse

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "text, normal",
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("bitnami/nginx", "docker.io/bitnami/nginx:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("docker.io/library/busybox:x", "docker.io/library/busybox:x"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:v1", "localhost:5000/app:v1"),
        ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("MyHost/app", "MyHost/app:latest"),
        ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"busybox:1.36@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        ("a__b/c-d--e.f", "docker.io/a__b/c-d--e.f:latest"),
    ],
)
def test_normalised(text: str, normal: str) -> None:
    assert str(parse(text)) == normal
    assert str(parse(normal)) == normal


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":tag",
        "/app",
        "app/",
        "a//b",
        "UPPER",
        "docker.io/Upper",
        "app:",
        "app:-tag",
        "app:" + "t" * 129,
        "a_.b",
        "a___b",
        "-a",
        "a b",
        "a\n",
        "a\0b",
        "é",
        "../../etc/passwd",
        "host:port/app",
        "app@sha256:abc",
        f"app@{DIGEST.upper()}",
        f"app@{DIGEST}\n",
        "app@md5:" + "0" * 32,
        f"app@{DIGEST}@{DIGEST}",
        "sha256:" + "a" * 64,
        "a" * 64,
        "x" * 256,
        "exa_mple.com/app",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(BadReference):
        parse(text)


component = st.from_regex(r"\A[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,8}){0,2}\Z")
domain = st.from_regex(r"\A[a-z0-9]{1,6}(\.[a-z0-9]{1,6}){1,2}(:[0-9]{2,5})?\Z") | st.sampled_from(
    ["localhost", "localhost:5000", "docker.io"]
)
tag = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}\Z")


@given(domain, st.lists(component, min_size=1, max_size=4), tag)
def test_well_formed_is_kept(host: str, parts: list[str], name: str) -> None:
    found = parse(f"{host}/{'/'.join(parts)}:{name}")
    assert (found.domain, found.tag) == (host, name)
    library = host == "docker.io" and len(parts) == 1
    assert found.path == "/".join(["library", *parts] if library else parts)
    assert parse(str(found)) == found


@given(st.text(max_size=60))
def test_any_text_parses_to_something_stable_or_is_refused(text: str) -> None:
    try:
        found = parse(text)
    except BadReference:
        return
    assert parse(str(found)) == found
    # What becomes part of a URL or a path has nothing that could change its meaning there.
    assert not set(str(found)) & set(" %?#\\\0\n") and ".." not in found.path.split("/")


@given(st.text(alphabet="0123456789abcdefABCDEF:sha256/.", max_size=90))
def test_digests_are_exact(text: str) -> None:
    if reference.is_digest(text):
        algorithm, _, digits = text.partition(":")
        assert {"sha256": 64, "sha384": 96, "sha512": 128}[algorithm] == len(digits) and set(digits) <= set("0123456789abcdef")
