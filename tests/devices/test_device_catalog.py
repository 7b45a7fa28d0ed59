"""Names, aliases, notices and the user's own device files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsim.data_files import data_dir
from kvsim.device_catalog import AMBIGUOUS_NAMES, list_devices, load_device
from kvsim.errors import InvalidSpec, UnknownName
from kvsim.spec_folder import normalize_name

ALIASES = [(alias, name) for name in list_devices() for alias in load_device(name).spec.aliases]


@st.composite
def respelled(draw: st.DrawFn) -> tuple[str, str]:
    """A device name with other case and other separators."""
    name = draw(st.sampled_from(list_devices()))
    spelled = "".join(draw(st.sampled_from("-_ ")) if c == "-" else draw(st.sampled_from((c, c.upper()))) for c in name)
    return name, spelled


@given(respelled())
def test_case_and_separators_do_not_matter(pair):
    name, spelled = pair
    resolved = load_device(spelled)
    assert resolved.spec.name == name
    assert resolved.notice is None


def test_names_are_sorted_and_load_under_themselves():
    assert list(list_devices()) == sorted(list_devices())
    assert [load_device(name).spec.name for name in list_devices()] == list(list_devices())


def test_no_name_means_two_devices():
    known = [*list_devices(), *AMBIGUOUS_NAMES, *(normalize_name(alias) for alias, _ in ALIASES)]
    assert len(known) == len(set(known))


@pytest.mark.parametrize(("alias", "name"), ALIASES)
def test_every_alias_in_a_file_finds_that_device(alias, name):
    resolved = load_device(alias)
    assert (resolved.spec.name, resolved.notice) == (name, None)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),  # torch.cuda.get_device_name
        ("NVIDIA A100-SXM4-40GB", "a100-sxm-40gb"),
        ("AMD Instinct MI300X", "mi300x"),
        ("h200_sxm", "h200-sxm"),  # aiconfigurator
        ("rtx_pro_6000_server", "rtx-pro-6000"),
        ("L40S", "l40s"),  # SkyPilot
        ("B200", "b200-sxm"),
        ("m4-max", "apple-m4-max"),
        ("trillium", "tpu-v6e"),
    ],
)
def test_names_of_other_tools_are_understood(alias, name):
    assert load_device(alias).spec.name == name


@pytest.mark.parametrize(
    ("alias", "name"), [("a100", "a100-sxm-80gb"), ("H100", "h100-sxm"), ("a100_sxm", "a100-sxm-80gb")]
)
def test_ambiguous_short_name_says_what_it_took_and_what_else_there_is(alias, name):
    resolved = load_device(alias)
    assert resolved.spec.name == name
    assert resolved.notice is not None
    assert name in resolved.notice
    for other in AMBIGUOUS_NAMES[normalize_name(alias)].others:
        assert other in resolved.notice


def test_a100_notice_names_both_sizes_and_both_form_factors():
    notice = load_device("a100").notice or ""
    assert all(other in notice for other in ("a100-sxm-40gb", "a100-pcie-80gb", "a100-pcie-40gb"))


def test_ambiguous_names_point_to_devices_of_the_catalogue():
    for ambiguity in AMBIGUOUS_NAMES.values():
        assert {ambiguity.device, *ambiguity.others} <= set(list_devices())


@pytest.mark.parametrize(("wrong", "near"), [("h100-sxn", "h100-sxm"), ("MI300Y", "mi300x"), ("tpu-v6", "tpu-v6e")])
def test_unknown_name_suggests_the_nearest(wrong, near):
    with pytest.raises(UnknownName) as caught:
        load_device(wrong)
    assert near in caught.value.suggestions
    assert repr(wrong) in str(caught.value)


def test_users_own_file_is_read(tmp_path):
    text = (data_dir("hardware_specs") / "l4.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("name: l4\n", "name: my-card\n").replace("value: 300 GB/s", "value: 450 GB/s"))
    resolved = load_device(str(path))
    assert resolved.spec.name == "my-card"
    assert resolved.spec.bandwidth_bytes_per_s == 450e9
    assert resolved.notice is None


@pytest.mark.parametrize(
    ("old", "new", "field", "shown"),
    [
        ("value: 300 GB/s", "value: 300", "memory_bandwidth.value", "300"),
        ("value: 300 GB/s", "value: 300 GHz", "memory_bandwidth.value", "'300 GHz'"),
        ("value: 24 GiB", "value: -24 GiB", "memory_capacity.value", "'-24 GiB'"),
        ("value: 72 W", "value: .inf", "tdp.value", "inf"),
        ("confidence: high", "confidence: sure", "confidence", "'sure'"),
        ("memory_kind: GDDR6", "memory_knd: GDDR6", "memory_knd", "memory_kind"),
    ],
)
def test_wrong_value_is_refused_with_file_field_and_value(tmp_path, old, new, field, shown):
    text = (data_dir("hardware_specs") / "l4.yaml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(InvalidSpec) as caught:
        load_device(str(path))
    message = str(caught.value)
    assert str(path) in message
    assert field in message
    assert shown in message


def test_fact_with_an_unlisted_source_is_refused(tmp_path):
    text = (data_dir("hardware_specs") / "l4.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("{value: 72 W, source: techpowerup}", "{value: 72 W, source: hearsay}"))
    with pytest.raises(InvalidSpec, match="hearsay"):
        load_device(str(path))


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InvalidSpec, match=r"absent\.yaml"):
        load_device(str(tmp_path / "absent.yaml"))
