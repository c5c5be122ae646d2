"""download_models.py as a user runs it, against a small hub on this machine."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import filelock
import pytest

import download_models
from configs import load_config
from errors import ResourceError, WeightsError
from models import downloads
from models.downloads import RemoteFile, check_disk, damage, download

ROOT = Path(__file__).parents[1]
REVISION = "0123456789abcdef0123456789abcdef01234567"
LARGE = bytes(range(256)) * 4096 * 3  # 3 MiB
FILES = {
    "config.json": b'{"dim": 64}\n',
    "diffusion_pytorch_model.safetensors": LARGE,
    "google/umt5-xxl/tokenizer.json": b"{}",
    "google/umt5-xxl/deeper/notes.txt": b"not asked for",
    "README.md": b"not asked for",
}
LFS = ("diffusion_pytorch_model.safetensors",)  # the hub states SHA-256 for these, git's SHA-1 for the rest


class Hub(BaseHTTPRequestHandler):
    """The three addresses that a download needs. State sits on the server object."""

    def log_message(self, *_):
        pass

    def do_GET(self):  # noqa: N802
        path = urlsplit(self.path).path
        self.server.seen.append((path, self.headers.get("Range")))
        if path == "/api/models/org/model":
            return self.answer(200, json.dumps(model_info(self.server.files)).encode())
        if path == "/api/models/org/gated":
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        prefix = f"/org/model/resolve/{REVISION}/"
        name = path.removeprefix(prefix).removeprefix("/plain/")
        if name not in self.server.served:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        return self.send_file(self.server.served[name])

    def send_file(self, content):
        if self.server.overloads:
            self.server.overloads -= 1
            return self.answer(503, b"")
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content)
        if self.server.breaks:  # lose the connection half way, as often as asked
            self.server.breaks -= 1
            end = start + (end - start) // 2
        if self.server.stalls and len(content) > 2**20:
            self.wfile.write(content[: 2**21])
            time.sleep(30)
            return None
        self.wfile.write(content[start:end])
        return None

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def model_info(files):
    siblings = []
    for name, content in files.items():
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        sibling = {"rfilename": name, "size": len(content), "blobId": git}
        if name in LFS:
            sibling["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        siblings.append(sibling)
    return {"id": "org/model", "sha": REVISION, "siblings": siblings, "tags": [], "downloads": 0}


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.served, server.seen = dict(FILES), dict(FILES), []
    server.breaks, server.overloads, server.stalls = 0, 0, False
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def write_config(folder, repo="org/model", extra="", name="mine"):
    file = folder / f"{name}.yaml"
    file.write_text(
        f"description: a test\nrepo: {repo}\ndest: model\napprox_gib: 0.1\nfiles:\n"
        f"  transformer: [config.json, diffusion_pytorch_model*]\n  tokenizer: google/umt5-xxl/*\n{extra}"
    )
    return file


def run(hub_url, *arguments, offline=False, **environment):
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub_url,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **environment,
    }
    command = [sys.executable, str(ROOT / "download_models.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)


def last_line(result):
    return result.stderr.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------- whole command


def test_download_verify_and_run_again(hub, config, tmp_path):
    dest = tmp_path / "weights"
    result = run(hub.url, "--only", config, "--dest", dest)
    assert result.returncode == 0, result.stderr
    files = {str(path.relative_to(dest / "model")) for path in (dest / "model").rglob("*") if path.is_file()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors", "google/umt5-xxl/tokenizer.json"}
    for name in files:
        assert (dest / "model" / name).read_bytes() == FILES[name]

    hub.seen.clear()
    assert run(hub.url, "--only", config, "--dest", dest).returncode == 0
    assert [path for path, _ in hub.seen] == ["/api/models/org/model"]  # nothing is fetched twice

    # offline the files are enough; without one of them they are not
    assert run(hub.url, "--only", config, "--dest", dest, offline=True).returncode == 0
    (dest / "model" / "config.json").unlink()
    result = run(hub.url, "--only", config, "--dest", dest, offline=True)
    assert result.returncode == 4
    assert "config.json missing and HF_HUB_OFFLINE is set; unset it, then run: " in last_line(result)
    assert f"run: python download_models.py --only {config} --dest {dest}" in last_line(result)


def test_damaged_local_files_are_fetched_again(hub, config, tmp_path):
    dest = tmp_path / "weights"
    (dest / "model").mkdir(parents=True)
    (dest / "model" / "diffusion_pytorch_model.safetensors").write_bytes(LARGE[:-1] + b"x")
    (dest / "model" / "config.json").write_bytes(b"{}")
    result = run(hub.url, "--only", config, "--dest", dest)
    assert result.returncode == 0, result.stderr
    assert f"expected {len(FILES['config.json'])} bytes, found 2" in result.stderr
    assert "expected sha256" in result.stderr
    assert (dest / "model" / "diffusion_pytorch_model.safetensors").read_bytes() == LARGE


def test_dry_run_fetches_nothing(hub, config, tmp_path):
    result = run(hub.url, "--only", config, "--dest", tmp_path / "weights", "--dry_run")
    assert result.returncode == 0
    assert "3 files to fetch" in result.stderr
    assert not (tmp_path / "weights").exists()


def test_repository_without_a_file(hub, config, tmp_path):
    del hub.files["config.json"]
    result = run(hub.url, "--only", config, "--dest", tmp_path)
    assert result.returncode == 4
    assert f"org/model: no file config.json in this repository (revision {REVISION})" in last_line(result)


@pytest.mark.parametrize(("repo", "words"), [("org/gated", "HF_TOKEN"), ("org/none", "no such repository")])
def test_repository_without_access(hub, tmp_path, repo, words):
    result = run(hub.url, "--only", write_config(tmp_path, repo), "--dest", tmp_path)
    assert result.returncode == 4
    assert words in last_line(result)
    assert "Traceback" not in result.stderr


def test_no_connection(config, tmp_path):
    result = run("http://127.0.0.1:9", "--only", config, "--dest", tmp_path)
    assert result.returncode == 4
    assert "cannot reach the hub" in last_line(result)
    assert "HF_ENDPOINT" in last_line(result)


def test_disk_too_small(hub, tmp_path):
    config = tmp_path / "huge.yaml"
    config.write_text(
        f"description: huge\nurl: {hub.url}/plain/config.json\nsize: {2**60}\nsha256: '00'\ndest: model\n"
        "approx_gib: 1\nfiles: {part: config.json}\n"
    )
    result = run(hub.url, "--only", config, "--dest", tmp_path / "a" / "b")
    assert result.returncode == 5
    assert f"needs {2**30:.1f} GiB ({2**60} bytes) for 1 files" in last_line(result)
    assert "free; make room" in last_line(result)
    assert not (tmp_path / "a").exists()


def test_second_run_in_the_same_folder(hub, config, tmp_path):
    with filelock.FileLock(tmp_path / ".download.lock"):
        result = run(hub.url, "--only", config, "--dest", tmp_path)
    assert result.returncode == 2
    assert "another download is running" in last_line(result)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "wan9"], "known: antelopev2"),
        (["--only", "tiny"], "nothing to download"),
        (["--vace", "--wan_version", "2.2"], "--vace"),
        (["--wan_version", "3"], "accepted are 2.1, 2.2"),
    ],
)
def test_usage_errors(arguments, words):
    result = run("http://127.0.0.1:9", *arguments)
    assert result.returncode == 2
    assert words in last_line(result)


def test_help_and_list_are_quick(tmp_path):
    for flag in ("--help", "--list"):
        start = time.monotonic()
        result = run("http://127.0.0.1:9", flag, "--dest", tmp_path)
        assert result.returncode == 0
        assert time.monotonic() - start < 1.5
    assert "wan2.2-t2v-A14B" in result.stdout
    imported = subprocess.run(
        [sys.executable, "-c", "import download_models, sys; print('torch' in sys.modules, 'requests' in sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert imported.stdout.split() == ["False", "False"]


def wanted(*arguments):
    from download_models import parse_args, wanted_configs

    return [config["name"] for config in wanted_configs(parse_args(list(arguments)))]


def test_wan_version_brings_all_parts():
    extras = ["antelopev2", "face-parsing"]
    assert wanted("--wan_version", "2.1") == ["wan2.1-t2v-14B", "stand-in-wan2.1", *extras]
    assert wanted("--wan_version", "2.2") == ["wan2.2-t2v-A14B", "stand-in-wan2.2", *extras]
    assert wanted("--vace") == ["wan2.1-vace-14B", "stand-in-wan2.1", *extras]
    assert wanted("--only", "antelopev2") == ["antelopev2"]
    assert wanted("--only", "antelopev2", "--wan_version", "2.1")[0] == "antelopev2"


def test_method_brings_all_parts():
    instant_id = ["sdxl-base-1.0", "instantid", "antelopev2"]
    assert wanted("--method", "instantid") == instant_id
    assert wanted("--method", "instantid", "--only", "lcm-lora-sdxl") == ["lcm-lora-sdxl", *instant_id]
    faces = ["antelopev2", "face-parsing"]
    assert wanted("--method", "consisid") == ["consisid", *faces]
    assert wanted("--only", "consisid-1.5") == ["consisid-1.5", *faces]


def test_without_arguments_the_list_is_printed_and_nothing_fetched(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(downloads, "list_files", None)
    download_models.main(download_models.parse_args(["--dest", str(tmp_path)]))
    printed = capsys.readouterr().out
    download_models.main(download_models.parse_args(["--dest", str(tmp_path), "--list"]))
    assert capsys.readouterr().out == printed
    assert "wan2.1-t2v-14B" in printed and "--only NAME" in printed


def test_a_list_into_head_ends_in_order():
    listing = subprocess.Popen(
        [sys.executable, "download_models.py", "--list"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    listing.stdout.close()  # before it writes: a pipe that nobody reads
    assert listing.stderr.read() == b""
    assert listing.wait(timeout=60) == 0


def test_dry_run_without_a_connection_takes_the_sizes_of_configs(tmp_path, monkeypatch, caplog):
    def unreachable(config, root):
        raise downloads.UnreachableError("no route")

    monkeypatch.setattr(downloads, "list_files", unreachable)
    flags = ["--only", "wan2.1-t2v-1.3B", "antelopev2", "--dest", str(tmp_path)]
    with caplog.at_level("INFO", logger="selfsame"):
        download_models.main(download_models.parse_args([*flags, "--dry_run"]))
    total = sum(load_config(name)["approx_gib"] for name in ("wan2.1-t2v-1.3B", "antelopev2"))
    assert f"the hub was not asked: sizes are estimates of configs/; about {total:.2f} GiB to fetch" in caplog.text
    with pytest.raises(WeightsError, match="no route"):
        download_models.main(download_models.parse_args(flags))
    monkeypatch.setattr(download_models, "free_bytes", lambda root: 2**30)
    with pytest.raises(ResourceError, match=r"needs about .* GiB, 1.0 GiB free"):
        download_models.main(download_models.parse_args([*flags, "--dry_run"]))


def test_a_schedulers_stop_keeps_what_is_fetched(hub, config, tmp_path):
    """SIGTERM ends as Ctrl-C does: exit 130, a word on how to go on, and the same command goes on."""
    hub.stalls = True
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "download_models.py", "--only", str(config), "--dest", str(tmp_path / "weights")]
    fetching = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "weights" / "model" / "diffusion_pytorch_model.safetensors.part"
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    fetching.terminate()
    said = fetching.communicate(timeout=60)[1]
    assert fetching.returncode == 130, said
    assert said.strip().endswith("interrupted; what is fetched is kept, and the same command goes on")
    assert part.stat().st_size > 0
    hub.stalls = False
    assert run(hub.url, "--only", config, "--dest", tmp_path / "weights").returncode == 0
    assert part.with_suffix("").read_bytes() == LARGE
    assert any(wanted and wanted != "bytes=0-" for _, wanted in hub.seen)


# ------------------------------------------------------------------------------------------- one file


def remote(hub, folder, content=LARGE, **changes):
    hub.served["face.pth"] = content
    values = {
        "url": f"{hub.url}/plain/face.pth",
        "path": folder / "sub" / "face.pth",
        "size": len(LARGE),
        "sha256": hashlib.sha256(LARGE).hexdigest(),
        "git_sha1": None,
        "command": "run: this again",
    }
    return RemoteFile(**(values | changes))


def test_goes_on_where_an_earlier_run_stopped(hub, tmp_path):
    file = remote(hub, tmp_path)
    file.part.parent.mkdir()
    file.part.write_bytes(LARGE[:1_000_000])
    download(file)
    assert hub.seen == [("/plain/face.pth", "bytes=1000000-")]
    assert file.path.read_bytes() == LARGE
    assert not file.part.exists()


def test_lost_connections_are_taken_up_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "WAIT", 0)
    hub.breaks = 2
    file = remote(hub, tmp_path)
    download(file)
    assert file.path.read_bytes() == LARGE
    ranges = [seen for _, seen in hub.seen]
    assert len(ranges) == 3
    assert ranges[0] is None
    assert ranges[2].startswith("bytes=")


def test_a_connection_that_stays_broken_keeps_the_part(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "WAIT", 0)
    hub.breaks = 100
    file = remote(hub, tmp_path)
    with pytest.raises(WeightsError, match=r"connection lost at \d+ of 3145728 bytes.*run: this again"):
        download(file)
    assert 0 < file.part.stat().st_size < len(LARGE)
    assert not file.path.exists()
    hub.breaks = 0
    download(file)
    assert file.path.read_bytes() == LARGE


def test_wrong_bytes_are_removed(hub, tmp_path):
    file = remote(hub, tmp_path, content=LARGE[:-1] + b"x")
    with pytest.raises(WeightsError, match=f"expected sha256 {file.sha256}, found .*run: this again"):
        download(file)
    assert not file.path.exists()
    assert not file.part.exists()


def test_wrong_size(hub, tmp_path):
    file = remote(hub, tmp_path, content=LARGE[:100])
    with pytest.raises(WeightsError, match="expected 3145728 bytes, found 100"):
        download(file)


def test_server_says_no(hub, tmp_path):
    file = remote(hub, tmp_path, url=f"{hub.url}/plain/other")
    with pytest.raises(WeightsError, match="the server answers 404"):
        download(file)
    assert len(hub.seen) == 1  # asking again would not help


def test_an_overloaded_server_is_asked_again(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "WAIT", 0)
    hub.overloads = 2
    file = remote(hub, tmp_path)
    download(file)
    assert file.path.read_bytes() == LARGE
    assert len(hub.seen) == 3


def test_a_part_of_another_release_starts_over(hub, tmp_path):
    file = remote(hub, tmp_path)
    file.part.parent.mkdir()
    file.part.write_bytes(b"x" * (len(LARGE) + 1))
    download(file)
    assert file.path.read_bytes() == LARGE


@pytest.mark.parametrize("kind", ["symlink", "link"])
def test_a_planted_part_is_not_followed(hub, tmp_path, kind):
    file = remote(hub, tmp_path)
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    file.part.parent.mkdir()
    getattr(os, kind)(precious, file.part)
    download(file)
    assert precious.read_bytes() == b"precious" and file.path.read_bytes() == LARGE


def test_disk_full_on_the_way_keeps_the_part(hub, tmp_path, monkeypatch):
    def full(file):
        file.part.write_bytes(b"abc")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(downloads, "_fetch", full)
    file = remote(hub, tmp_path)
    with pytest.raises(ResourceError, match="disk full"):
        download(file)
    assert file.part.read_bytes() == b"abc"


def test_what_is_there_counts_for_the_disk(hub, tmp_path):
    file = remote(hub, tmp_path)
    file.part.parent.mkdir()
    file.part.write_bytes(LARGE[:1000])
    assert check_disk([file], tmp_path / "not" / "there") == len(LARGE) - 1000
    assert check_disk([], tmp_path) == 0


def test_small_files_are_checked_by_gits_hash(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"hello\n")
    # `echo hello | git hash-object --stdin`
    file = RemoteFile("", path, 6, None, "ce013625030ba8dba906f756967f9e9ca394464a", "")
    assert damage(file, path) is None
    path.write_bytes(b"jello\n")
    assert damage(file, path).startswith("expected git hash ce0136")
