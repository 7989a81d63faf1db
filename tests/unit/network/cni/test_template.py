"""Configurations from templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cri.errors import FailedPrecondition
from cri.network.cni import template
from cri.network.cni.conf import ConfError

DUAL = ("10.1.2.0/24", "fd00:1:2::/64")
#: As Google's clusters write it for containerd.
TEMPLATE = """{"name": "k8s-pod-network", "cniVersion": "0.3.1", "plugins": [{"type": "ptp", "mtu": 1460, "ipam": {"type": "host-local",
{{- /* one range per family */ -}}
 "subnet": "{{.PodCIDR}}",
 "ranges": [{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}],
 "routes": [{{range $i, $route := .Routes}}{{if $i}}, {{end}}{"dst": "{{$route}}"}{{end}}]}},
 {"type": "portmap", "capabilities": {"portMappings": true}}]}"""


def test_the_template_of_a_cluster() -> None:
    ipam = json.loads(template.render(TEMPLATE, DUAL))["plugins"][0]["ipam"]
    assert ipam["subnet"] == "10.1.2.0/24"
    assert ipam["ranges"] == [[{"subnet": "10.1.2.0/24"}], [{"subnet": "fd00:1:2::/64"}]]
    assert ipam["routes"] == [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]


@pytest.mark.parametrize(
    "text, said",
    [
        ("{{range .Routes}}<{{.}}>{{else}}none{{end}}", "<0.0.0.0/0><::/0>"),
        ("{{if .PodCIDR}}yes{{else}}no{{end}}", "yes"),
        ("a {{- .PodCIDR -}} b", "a10.1.2.0/24b"),
        ("{{range $x := .PodCIDRRanges}}{{if $x}}{{$x}} {{end}}{{end}}", "10.1.2.0/24 fd00:1:2::/64 "),
        ("no action {", "no action {"),
    ],
)
def test_the_language(text: str, said: str) -> None:
    assert template.render(text, DUAL) == said


@pytest.mark.parametrize(
    "text",
    [
        "{{.Nope}}",
        "{{end}}",
        "{{range .Routes}}",
        "{{if .PodCIDR}}",
        "{{else}}",
        "{{.Routes}}",
        "{{range .PodCIDR}}{{end}}",
        "{{range a b c}}{{end}}",
    ],
)
def test_what_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(ConfError, match="template"):
        template.render(text, DUAL)


def test_no_cidr_and_an_else() -> None:
    assert template.render("{{range .Routes}}x{{else}}none{{end}}", ()) == "none"


def test_it_is_installed_unless_there_is_another_one(tmp_path: Path) -> None:
    source, directory = tmp_path / "template", tmp_path / "net.d"
    source.write_text(TEMPLATE)
    template.install(source, directory, DUAL)
    made = directory / template.FILE
    assert "10.1.2.0/24" in made.read_text()
    template.install(source, directory, ("10.9.0.0/24",))
    assert "10.9.0.0/24" in made.read_text(), "our own is replaced"
    (directory / "05-other.conflist").write_text(made.read_text())
    template.install(source, directory, DUAL)
    assert "10.9.0.0/24" in made.read_text(), "another's wins"
    source.write_text("not json")
    (directory / "05-other.conflist").unlink()
    with pytest.raises(FailedPrecondition, match="template"):
        template.install(source, directory, DUAL)
