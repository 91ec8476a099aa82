"""One client of benchmarks/dicomweb.py, as a process of its own: it stores instances or asks for things, and times it.

`python benchmarks/dicomweb_load.py REQUEST` takes a JSON object, prints "ready", begins when it gets a line on stdin
and prints a JSON object. It must cost next to nothing beside the servers it shares the cores with: a raw socket that
stays open, one prebuilt body in which only UIDs are overwritten, answers that are read and not parsed.
"""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BOUNDARY = b"benchmark-boundary"
OK = 200
TIMEOUT_SECONDS = 120.0
READ_BYTES = 1024 * 1024
INSTANCES_PER_SERIES = 50
NUMBER_MARK = b"99999999"

# What a scanner writes besides what samples.py has: servers parse headers, so these must be of a usual length.
HEADER: dict[str, object] = {
    "InstanceCreationDate": "20240102",
    "InstanceCreationTime": "030407.120000",
    "SeriesDate": "20240102",
    "AcquisitionDate": "20240102",
    "ContentDate": "20240102",
    "SeriesTime": "030405.500000",
    "AcquisitionTime": "030406.100000",
    "ContentTime": "030406.900000",
    "InstitutionName": "Synthetic Hospital",
    "InstitutionAddress": "1 Example Street",
    "StationName": "CT01",
    "InstitutionalDepartmentName": "Radiology",
    "PhysiciansOfRecord": "Synthetic^Physician",
    "PerformingPhysicianName": "Synthetic^Performer",
    "OperatorsName": "Synthetic^Operator",
    "AdmittingDiagnosesDescription": "None",
    "PatientAge": "054Y",
    "PatientSize": "1.75",
    "PatientWeight": "75",
    "AdditionalPatientHistory": "No history: this patient is synthetic",
    "ContrastBolusAgent": "None",
    "BodyPartExamined": "CHEST",
    "ScanOptions": "HELIX",
    "SliceThickness": "1.25",
    "KVP": "120",
    "DataCollectionDiameter": "500",
    "DeviceSerialNumber": "000000",
    "SoftwareVersions": "1.0",
    "ProtocolName": "Chest routine",
    "ReconstructionDiameter": "360",
    "DistanceSourceToDetector": "949.147",
    "DistanceSourceToPatient": "541",
    "GantryDetectorTilt": "0",
    "TableHeight": "157.5",
    "RotationDirection": "CW",
    "ExposureTime": "570",
    "XRayTubeCurrent": "310",
    "Exposure": "4",
    "FilterType": "BODY FILTER",
    "GeneratorPower": "37200",
    "FocalSpots": "0.7",
    "ConvolutionKernel": "STANDARD",
    "PatientPosition": "FFS",
    "RevolutionTime": 0.5,
    "SingleCollimationWidth": 0.625,
    "TotalCollimationWidth": 40.0,
    "TableSpeed": 110.0,
    "TableFeedPerRotation": 55.0,
    "SpiralPitchFactor": 1.375,
    "AcquisitionNumber": "1",
    "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"],
    "FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.1.1",
    "PositionReferenceIndicator": "XY",
    "SliceLocation": "12.5",
    "PixelSpacing": ["0.703125", "0.703125"],
    "WindowCenter": "40",
    "WindowWidth": "400",
    "RescaleType": "HU",
    "RequestedProcedureDescription": "CT chest",
    "PerformedProcedureStepStartDate": "20240102",
    "PerformedProcedureStepStartTime": "030405",
    "PerformedProcedureStepID": "PPS1",
    "PerformedProcedureStepDescription": "CT chest",
    "RequestedProcedureID": "RP1",
}


@dataclass(frozen=True, slots=True)
class Request:
    """Store `count` instances of `size_bytes` below `root`; or, if there is an `accept`, ask for `paths` in turn."""

    port: int
    root: str
    count: int
    seed: str = ""
    size_bytes: int = 0
    paths: Sequence[str] = ()
    accept: str = ""


class Template:
    """A Part 10 file in a STOW-RS body; `next_body` makes it the next instance, in place."""

    def __init__(self, seed: str, size_bytes: int) -> None:
        from dicom_depot.testing.samples import make_uid

        self._make_uid = make_uid
        self._seed = seed
        self.study_uid = make_uid("benchmark study", seed)
        self.places: list[tuple[str, str]] = []
        marks = [make_uid("benchmark mark", kind) for kind in ("study", "series", "instance")]
        content = _file(marks, size_bytes)
        head = b"--%s\r\nContent-Type: application/dicom\r\n\r\n" % BOUNDARY
        self.body = bytearray(head + content + b"\r\n--%s--\r\n" % BOUNDARY)
        self.file_bytes = len(content)
        study, self._series, self._instance = (_places(self.body, mark.encode()) for mark in marks)
        self._number = _places(self.body, NUMBER_MARK)
        _overwrite(self.body, study, self.study_uid.encode())

    def next_body(self) -> bytearray:
        index = len(self.places)
        series_uid = self._make_uid("benchmark series", self._seed, index // INSTANCES_PER_SERIES)
        sop_instance_uid = self._make_uid("benchmark instance", self._seed, index)
        _overwrite(self.body, self._series, series_uid.encode())
        _overwrite(self.body, self._instance, sop_instance_uid.encode())
        _overwrite(self.body, self._number, b"%-8d" % (index % INSTANCES_PER_SERIES + 1))
        self.places.append((series_uid, sop_instance_uid))
        return self.body


def _file(uids: Sequence[str], size_bytes: int) -> bytes:
    from pydicom import dcmread

    from dicom_depot.testing.samples import ct_volume

    data_set = dcmread(io.BytesIO(ct_volume(slices=1, rows=1, columns=1)[0].content))
    for keyword, value in HEADER.items():
        setattr(data_set, keyword, value)
    data_set.StudyInstanceUID, data_set.SeriesInstanceUID, data_set.SOPInstanceUID = uids
    data_set.file_meta["MediaStorageSOPInstanceUID"].value = uids[2]
    data_set.InstanceNumber = NUMBER_MARK.decode()
    header_bytes = len(_written(data_set)) - len(data_set.PixelData)
    columns = 512 if size_bytes > 256 * 1024 else 128
    data_set.Columns = columns
    data_set.Rows = rows = max(1, (size_bytes - header_bytes) // (2 * columns))
    data_set.PixelData = bytes(range(256)) * (rows * columns // 128)
    return _written(data_set)


def _written(data_set: Any) -> bytes:
    buffer = io.BytesIO()
    data_set.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _places(content: bytearray, mark: bytes) -> list[int]:
    places, place = [], content.find(mark)
    while place >= 0:
        places.append(place)
        place = content.find(mark, place + 1)
    return places


def _overwrite(content: bytearray, places: Sequence[int], value: bytes) -> None:
    for place in places:
        content[place : place + len(value)] = value


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a server; after `is_last` the connection is not used again."""

    status: int
    body: bytes
    is_last: bool


def read_answer(stream: io.BufferedIOBase) -> Answer:
    """One HTTP/1.1 answer: a body of a known length, in chunks, or up to the end of the stream (RFC 9112 section 6)."""
    status_line = stream.readline()
    if not status_line.startswith(b"HTTP/1."):
        raise ConnectionError(f"no answer, but {status_line!r}")
    length, is_chunked, is_last = -1, False, False
    while (line := stream.readline().strip().lower()) != b"":
        name, _, value = line.partition(b":")
        if name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            is_chunked = b"chunked" in value
        elif name == b"connection":
            is_last = b"close" in value
    if is_chunked:
        body = b"".join(_chunks(stream))
    elif length >= 0:
        body = stream.read(length)
        if len(body) != length:
            raise ConnectionError(f"the answer ended after {len(body)} of {length} bytes")
    else:
        # read() would ask for 8 KB at a time, and cost more than many a server does.
        body, is_last = b"".join(iter(lambda: stream.read1(READ_BYTES), b"")), True
    return Answer(int(status_line.split()[1]), body, is_last)


def _chunks(stream: io.BufferedIOBase) -> Iterator[bytes]:
    while (size := int(stream.readline().partition(b";")[0], 16)) > 0:
        yield stream.read(size)
        stream.readline()
    while stream.readline().strip():
        pass


class Connection:
    """A connection that is kept as long as the server keeps it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.opened = 0
        self._socket: socket.socket | None = None
        self._stream: io.BufferedReader | None = None

    def ask(self, head: bytes, body: bytes | bytearray = b"") -> bytes:
        """The body of the answer, which must be 200."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_SECONDS)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._stream = io.BufferedReader(self._socket.makefile("rb", buffering=0), READ_BYTES)
            self.opened += 1
        assert self._stream is not None
        sent = self._socket.sendmsg([head, body])
        if sent < len(head):
            raise ConnectionError("the socket did not take the head of a request")
        self._socket.sendall(memoryview(body)[sent - len(head) :])
        answer = read_answer(self._stream)
        if answer.is_last:
            self._stream.close()
            self._socket.close()
            self._socket = None
        if answer.status != OK:
            request_line = head.split(b"\r\n", 1)[0].decode()
            raise ConnectionError(f"{request_line}: {answer.status} {answer.body[:500]!r}")
        return answer.body


def store(request: Request) -> dict[str, Any]:
    template = Template(request.seed, request.size_bytes)
    head = (
        f"POST {request.root}/studies HTTP/1.1\r\nHost: 127.0.0.1:{request.port}\r\nAccept: application/dicom+json\r\n"
        f'Content-Type: multipart/related; type="application/dicom"; boundary={BOUNDARY.decode()}\r\n'
        f"Content-Length: {len(template.body)}\r\n\r\n"
    ).encode()
    _wait_for_start()
    connection = Connection(request.port)
    seconds, began, cpu = [], time.monotonic(), time.process_time()
    for _ in range(request.count):
        body, asked = template.next_body(), time.monotonic()
        connection.ask(head, body)
        seconds.append(time.monotonic() - asked)
    return {
        **_usage(began, cpu, seconds, connection),
        "study_uid": template.study_uid,
        "places": template.places,
        "file_bytes": template.file_bytes,
    }


def get(request: Request) -> dict[str, Any]:
    """The first request is not measured: it opens the connection, and fills what caches a server has."""
    heads = [
        "\r\n".join(
            (
                f"GET {request.root}{path} HTTP/1.1",
                f"Host: 127.0.0.1:{request.port}",
                f"Accept: {request.accept}",
                "\r\n",
            )
        ).encode()
        for path in request.paths
    ]
    _wait_for_start()
    connection = Connection(request.port)
    first = connection.ask(heads[0])
    seconds, began, cpu = [], time.monotonic(), time.process_time()
    for number in range(request.count):
        asked = time.monotonic()
        connection.ask(heads[number % len(heads)])
        seconds.append(time.monotonic() - asked)
    return {
        **_usage(began, cpu, seconds, connection),
        "body_bytes": len(first),
        "parts": first.lower().count(b"\r\ncontent-type:"),
    }


def _wait_for_start() -> None:
    print("ready", flush=True)
    if not sys.stdin.readline():
        raise SystemExit("the benchmark ended")


def _usage(began: float, cpu: float, seconds: list[float], connection: Connection) -> dict[str, Any]:
    """The clock is the machine's, so that the begin and end of several clients can be compared."""
    return {
        "began": began,
        "ended": time.monotonic(),
        "cpu_seconds": round(time.process_time() - cpu, 4),
        "seconds": [round(each, 6) for each in seconds],
        "connections_opened": connection.opened,
    }


@contextmanager
def waiting_clients(requests: Sequence[Request]) -> Iterator[list[subprocess.Popen[str]]]:
    """One process for each request, each ready to begin; none is left at the end of the block."""
    program = str(Path(__file__).resolve())
    clients = [
        subprocess.Popen(
            [sys.executable, program, json.dumps(asdict(request))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for request in requests
    ]
    try:
        for client in clients:
            assert client.stdout is not None
            if client.stdout.readline() != "ready\n":
                raise RuntimeError("a client of the benchmark did not start; what it said is above")
        yield clients
    finally:
        for client in clients:
            client.kill()
            client.communicate()


def run_clients(clients: Sequence[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Let them begin, all at once, and return their answers."""
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
    outputs = [client.communicate()[0] for client in clients]
    if any(client.returncode for client in clients):
        raise RuntimeError("a client of the benchmark failed; what it said is above")
    return [json.loads(output) for output in outputs]


def main() -> None:
    request = Request(**json.loads(sys.argv[1]))
    print(json.dumps(get(request) if request.accept else store(request)), flush=True)


if __name__ == "__main__":
    main()
