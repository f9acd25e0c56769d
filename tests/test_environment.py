"""./python chooses the right Python; the Makefile installs the locks, and passes paths on unchanged."""

import os
import shutil
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.artifacts import file_md5
from pipeline.core.errors import TemporaryError, UserError
from pipeline.core.settings import CERTIFICATE_VARIABLES, get_settings
from pipeline.core.yaml import read_yaml
from pipeline.datasets.fetch import find_archive
from tests.conftest import PROJECT, params

PATH_WITH_SPECIAL_CHARS = "/no/my photos #1 é'\"$HOME%20?;&"


def script(path: Path, code: str) -> Path:
    """Write an executable shell script, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{code}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def environment_of(folder: Path, *, name: str) -> Path:
    """Make a fake virtual environment with DVC, whose Python prints `name` and its arguments; return its folder."""
    script(folder / "bin" / "dvc", "")
    return script(folder / "bin" / "python", f'echo {name} "$@"').parent.parent


def run_python(folder: Path, **variables: str) -> str:
    """Run ./python in `folder` as DVC does, with another Python in the PATH, and return its output."""
    other = environment_of(folder / "other", name="path") / "bin"
    clean = {"PATH": f"{other}{os.pathsep}/usr/bin{os.pathsep}/bin"}
    (folder / "python").write_bytes((PROJECT / "python").read_bytes())
    done = subprocess.run(
        ["/bin/sh", "-c", "sh ./python -m x 'a b'"], cwd=folder, env=clean | variables, capture_output=True, check=True
    )
    return done.stdout.decode().strip()


def test_stages_run_in_the_projects_environment_without_activation(tmp_path: Path) -> None:
    project = tmp_path / "é project"
    environment_of(project / ".venv", name="own")
    assert run_python(project) == "own -m x a b"


def test_the_projects_environment_takes_precedence_over_an_activated_one(tmp_path: Path) -> None:
    active = environment_of(tmp_path / "active", name="active")
    environment_of(tmp_path / ".venv", name="own")
    assert run_python(tmp_path, VIRTUAL_ENV=str(active)) == "own -m x a b"


def test_without_venv_stages_run_in_the_activated_environment(tmp_path: Path) -> None:
    active = environment_of(tmp_path / "active", name="active")
    assert run_python(tmp_path, VIRTUAL_ENV=str(active)) == "active -m x a b"
    (active / "bin" / "dvc").unlink()  # an environment without DVC is for something else
    assert run_python(tmp_path, VIRTUAL_ENV=str(active)) == "path -m x a b"


def test_an_experiment_in_a_temporary_folder_runs_in_the_projects_environment(tmp_path: Path) -> None:
    environment_of(tmp_path / "project" / ".venv", name="own")
    active = environment_of(tmp_path / "active", name="active")
    (tmp_path / "temporary").mkdir()
    variables = {"DVC_ROOT": str(tmp_path / "project"), "VIRTUAL_ENV": str(active)}
    assert run_python(tmp_path / "temporary", **variables) == "own -m x a b"


def test_stages_of_a_flow_run_use_its_python(tmp_path: Path) -> None:
    environment_of(tmp_path / ".venv", name="own")
    flow = environment_of(tmp_path / "flow", name="flow") / "bin" / "python"
    assert run_python(tmp_path, PIPELINE_PYTHON=str(flow)) == "flow -m x a b"


def test_without_an_environment_the_python_of_the_path_runs(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to("/nonexistent")
    assert run_python(tmp_path) == "path -m x a b"


def test_every_stage_runs_by_the_python_script() -> None:
    stages = read_yaml(PROJECT / "dvc.yaml")["stages"]
    assert {stage["cmd"] for stage in stages.values()} == {f"./python -m pipeline.{name}" for name in stages}
    assert os.access(PROJECT / "python", os.X_OK)


def make(
    *arguments: str, folder: Path, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env={name: value for name, value in environment.items() if name != "MAKEFLAGS"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Return a project of Makefile and locks, whose Python and uv print their arguments, one per line."""
    project = tmp_path / "a project"
    (project / "requirements").mkdir(parents=True)
    for path in (PROJECT / "Makefile", PROJECT / "pyproject.toml", *(PROJECT / "requirements").glob("*.lock")):
        (project / path.relative_to(PROJECT)).write_bytes(path.read_bytes())
    for name in ("python", "uv"):
        script(project / ".venv" / "bin" / name, "printf '%s\\n' \"$@\"")
    (project / ".venv" / ".installed").touch()
    return project


def test_make_passes_a_path_on_unchanged(installed: Path) -> None:
    done = make("run", f"IMAGES={PATH_WITH_SPECIAL_CHARS}", "SET=train.epochs=1 train.seed=2", folder=installed)
    expected = [
        "-m",
        "flows.train_classifier",
        "--images",
        PATH_WITH_SPECIAL_CHARS,
        "--set",
        "train.epochs=1",
        "--set",
        "train.seed=2",
    ]
    assert done.stdout.splitlines() == expected
    assert make("run", "RECIPE=digits", folder=installed).stdout.splitlines()[2:] == ["--recipe", "digits"]
    done = make("serve", f"MODEL={PATH_WITH_SPECIAL_CHARS}", "PORT=8081", folder=installed)
    assert done.stdout.splitlines()[2:] == ["--model", PATH_WITH_SPECIAL_CHARS, "--port", "8081"]


def test_environment_variables_do_not_change_what_make_runs_or_installs(installed: Path) -> None:
    names = ("IMAGES", "RECIPE", "SET", "EXTRAS", "MODEL", "PORT", "IMAGES_FOLDER", "SERVED_MODEL")
    environment = os.environ | dict.fromkeys(names, "nightly")
    done = make("run", folder=installed, environment=environment)
    assert done.stdout.splitlines() == ["-m", "flows.train_classifier"], done.stderr
    done = make("run", "RECIPE=digits", "IMAGES=", folder=installed, environment=environment)
    assert done.stdout.splitlines()[2:] == ["--recipe", "digits"]
    assert "lock" not in make("install", folder=installed, environment=environment).stdout
    done = make("serve", folder=installed, environment=environment)
    assert done.stdout.splitlines() == ["-m", "pipeline.serve"], done.stderr


def test_installed_extras_stay_installed(installed: Path) -> None:
    make("install", "EXTRAS=s3 postgresql", folder=installed)
    again = make("install", "EXTRAS=ssh", folder=installed)
    locks = [line for line in again.stdout.splitlines() if line.startswith("requirements/")]
    assert locks == [f"requirements/{name}.lock" for name in ("base", "uv", "postgresql", "s3", "ssh")]
    assert again.returncode == 0


def test_a_changed_lock_of_an_installed_extra_is_installed_again(installed: Path) -> None:
    make("install", "EXTRAS=s3", folder=installed)
    assert "requirements/s3.lock" not in make("install", folder=installed).stdout
    os.utime(installed / ".venv" / ".installed", (0, 0))
    assert "requirements/s3.lock" in make("install", folder=installed).stdout


def test_an_unknown_extra_is_reported_in_one_line(installed: Path) -> None:
    done = make("install", "EXTRAS=s3 gcs", folder=installed)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert "EXTRAS: found gcs; allowed: s3 gs azure ssh postgresql" in line


def test_a_broken_link_to_an_environment_is_reported(installed: Path) -> None:
    (installed / ".venv").rename(installed / "elsewhere")
    (installed / ".venv").symlink_to("nowhere")
    done = make("install", folder=installed)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("error: .venv is a link to nowhere, which is no folder; make that")


def test_an_environment_behind_a_link_is_used(installed: Path) -> None:
    (installed / ".venv").rename(installed / "else where")
    (installed / ".venv").symlink_to("else where")
    (installed / ".venv" / ".installed").unlink()
    done = make("install", folder=installed)
    assert done.returncode == 0, done.stderr
    assert "requirements/base.lock" in done.stdout
    assert (installed / "else where" / ".installed").exists()


class Index(SimpleHTTPRequestHandler):
    """A server of the files of a folder that logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


def openssl(folder: Path, command: str) -> None:
    subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `ca.pem`, an authority that no system trusts, and `server.pem`, signed by it for localhost.

    The folder `ca` in it contains `ca.pem` in the form in which OpenSSL searches a folder.
    """
    folder = tmp_path_factory.mktemp("company")
    key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    authority = "-subj /CN=Company -addext keyUsage=critical,keyCertSign,cRLSign"  # Python 3.13 refuses one without it
    openssl(folder, f"req -x509 {key} -keyout ca.key -out ca.pem -days 2 {authority}")
    openssl(folder, f"req {key} -keyout server.key -out server.csr -subj /CN=localhost")
    (folder / "extensions").write_text(
        "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\nauthorityKeyIdentifier=keyid\n"
    )
    sign = "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions"
    openssl(folder, f"{sign} -out server.crt")
    (folder / "ca").mkdir()
    (folder / "ca" / "ca.pem").write_bytes((folder / "ca.pem").read_bytes())
    openssl(folder, "rehash ca")
    (folder / "server.pem").write_bytes((folder / "server.crt").read_bytes() + (folder / "server.key").read_bytes())
    return folder


@pytest.fixture
def inspected(company: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve `tmp_path` over TLS with the company's certificate and yield the URL; no variable names the authority."""
    for name in CERTIFICATE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, directory=tmp_path))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(company / "server.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("NO_PROXY", "localhost")
    yield f"https://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def authority(variable: str, company: Path) -> str:
    return str(company / ("ca" if variable == "SSL_CERT_DIR" else "ca.pem"))


@pytest.mark.parametrize("variable", CERTIFICATE_VARIABLES)
def test_the_download_trusts_the_companys_certificate_authority(
    variable: str, inspected: str, company: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "archive").write_bytes(b"x")
    values = {"download__urls": [f"{inspected}/archive"], "download__md5": file_md5(tmp_path / "archive")}
    with pytest.raises(TemporaryError, match=r"TLS: .*CERTIFICATE_VERIFY_FAILED"):
        find_archive(params(**values).download)
    monkeypatch.setenv(variable, authority(variable, company))
    get_settings.cache_clear()
    assert find_archive(params(**values).download).read_bytes() == b"x"


def test_the_download_trusts_a_system_that_has_only_a_folder_of_certificates(
    inspected: str, company: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "archive").write_bytes(b"x")
    values = {"download__urls": [f"{inspected}/archive"], "download__md5": file_md5(tmp_path / "archive")}
    paths = ssl.get_default_verify_paths()
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: paths._replace(cafile="", capath=str(company / "ca")))
    assert find_archive(params(**values).download).read_bytes() == b"x"


def test_missing_certificates_are_reported_in_one_line(
    inspected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_CERT", "/no/ca.pem")
    with pytest.raises(UserError, match=r"PIP_CERT: no such file /no/ca.pem; allowed: a file or folder of cert"):
        find_archive(params(download__urls=[f"{inspected}/archive"], download__md5="0" * 32).download)


def write_package(folder: Path) -> str:
    """Write a package index with one package, and return its line for a lock file."""
    page = folder / "simple" / "tiny" / "index.html"
    page.parent.mkdir(parents=True)
    wheel = page.with_name("tiny-1-py3-none-any.whl")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "import sys\n\ndef main():\n    print(sys.prefix)\n")
        archive.writestr("tiny-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
        archive.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.dist-info/entry_points.txt", "[console_scripts]\ntiny = tiny:main\n")
        archive.writestr("tiny-1.dist-info/RECORD", "")
    page.write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    return f"tiny==1 --hash=sha256:{sha256(wheel.read_bytes()).hexdigest()}\n"


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "PIP_CERT", "CURL_CA_BUNDLE", "SSL_CERT_DIR"])
def test_make_installs_through_a_companys_tls_inspection(  # noqa: PLR0917
    variable: str, inspected: str, company: Path, tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (installed / "requirements" / "base.lock").write_text(write_package(tmp_path))
    for name in ("uv", "s3"):
        (installed / "requirements" / f"{name}.lock").write_text("")
    (installed / ".venv" / ".installed").touch()  # it must be newer than the locks
    for name in ("python", "uv"):
        (installed / ".venv" / "bin" / name).unlink()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", installed / ".venv"], check=True)
    script(installed / ".venv" / "bin" / "uv", f'exec "{Path(sys.executable).with_name("uv")}" "$@"')
    monkeypatch.setenv("UV_INDEX_URL", f"{inspected}/simple")
    monkeypatch.setenv("UV_NO_CACHE", "true")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    assert make("install", "EXTRAS=s3", folder=installed).returncode != 0
    monkeypatch.setenv(variable, authority(variable, company))
    done = make("install", "EXTRAS=s3", folder=installed)
    assert done.returncode == 0, done.stderr
    assert list((installed / ".venv" / "lib").glob("python*/site-packages/tiny.py"))


@pytest.mark.parametrize("linked", [False, True])
def test_scripts_of_a_moved_or_copied_environment_run_there(
    linked: bool, tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (installed / "requirements").glob("*.lock"):
        path.write_text("")
    (installed / "requirements" / "base.lock").write_text(write_package(tmp_path))
    environment = installed / ".venv"
    shutil.rmtree(environment)
    if linked:
        environment = installed / "else where"
        (installed / ".venv").symlink_to("else where")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    next(environment.glob("lib/python*/site-packages")).joinpath("pip.py").write_text(
        ""
    )  # installing pip would take seconds
    uv = Path(sys.executable).with_name("uv")
    script(environment / "bin" / "uv", f'exec "{uv}" "$@"')
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "simple" / "tiny"))
    monkeypatch.setenv("UV_OFFLINE", "true")
    subprocess.run(  # as an earlier version of the project did
        [uv, "pip", "sync", "--quiet", "requirements/base.lock"],
        cwd=installed,
        env=os.environ | {"VIRTUAL_ENV": str(environment)},
        check=True,
    )
    assert str(environment) in (environment / "bin" / "tiny").read_text()
    done = make("install", folder=installed)
    assert done.returncode == 0, done.stderr
    copy = Path(shutil.copytree(installed, tmp_path / "copy", symlinks=True))
    for project in (copy, installed.rename(tmp_path / "moved")):
        for command in (".venv/bin/tiny", "source .venv/bin/activate && tiny"):
            out = subprocess.run(["bash", "-c", command], cwd=project, capture_output=True, text=True, check=True)
            assert Path(out.stdout.strip()).resolve() == (project / ".venv").resolve()
