"""What launchers write into the environment, read as numbers, and refused where it contradicts itself."""

import subprocess

import pytest

from lakonlab.parallel import environment
from lakonlab.parallel.environment import DERIVED_PORTS, LaunchError, Placement, expand_node_list, read_placement

TORCHRUN = {
    'RANK': '5',
    'WORLD_SIZE': '8',
    'LOCAL_RANK': '1',
    'LOCAL_WORLD_SIZE': '4',
    'MASTER_ADDR': 'first',
    'MASTER_PORT': '1234',
}
SLURM = {
    'SLURM_PROCID': '5',
    'SLURM_NTASKS': '8',
    'SLURM_LOCALID': '1',
    'SLURM_NTASKS_PER_NODE': '4',
    'SLURM_JOB_NODELIST': 'gpu[07-08]',
    'SLURM_JOB_ID': '1000',
}
OPEN_MPI = {
    'OMPI_COMM_WORLD_RANK': '5',
    'OMPI_COMM_WORLD_SIZE': '8',
    'OMPI_COMM_WORLD_LOCAL_RANK': '1',
    'OMPI_COMM_WORLD_LOCAL_SIZE': '4',
    'MASTER_ADDR': 'first',
}
MVAPICH = {name.replace('OMPI', 'MV2'): value for name, value in OPEN_MPI.items()}
HYDRA = {'PMI_RANK': '5', 'PMI_SIZE': '8', 'MPI_LOCALRANKID': '1', 'MPI_LOCALNRANKS': '4', 'MASTER_ADDR': 'first'}
PALS = {'PMI_RANK': '5', 'PMI_SIZE': '8', 'PMI_LOCAL_RANK': '1', 'PMI_LOCAL_SIZE': '4', 'MASTER_ADDR': 'first'}


@pytest.fixture(autouse=True)
def _no_scontrol(monkeypatch):
    """As on a machine without Slurm."""
    monkeypatch.setattr(environment.shutil, 'which', lambda name: None)


@pytest.mark.parametrize(
    ('launcher', 'variables', 'address', 'port'),
    [
        ('pytorch', TORCHRUN, 'first', 1234),
        ('slurm', {**SLURM, 'MASTER_PORT': '77'}, 'gpu07', 77),
        ('slurm', {**SLURM, 'MASTER_ADDR': 'here', 'MASTER_PORT': '77'}, 'here', 77),
        ('slurm', {**SLURM, 'SLURM_STEP_NODELIST': 'gpu08', 'MASTER_PORT': '77'}, 'gpu08', 77),
        ('mpi', {**OPEN_MPI, 'MASTER_PORT': '77'}, 'first', 77),
        ('mpi', OPEN_MPI, 'first', 29500),
        ('mpi', MVAPICH, 'first', 29500),
        ('mpi', HYDRA, 'first', 29500),
        ('mpi', PALS, 'first', 29500),
    ],
)
def test_each_launcher(launcher, variables, address, port):
    assert read_placement(launcher, variables) == Placement(5, 8, 1, 4, address, port)


def test_no_launcher():
    assert read_placement('none', {}) is None
    assert read_placement('none', {**TORCHRUN, 'WORLD_SIZE': '1'}) is None


def test_a_process_of_torchrun_without_a_launcher_is_refused():
    with pytest.raises(LaunchError, match=r'WORLD_SIZE=8.*add --launcher pytorch'):
        read_placement('none', TORCHRUN)


@pytest.mark.parametrize(
    ('variable', 'launcher'), [('SLURM_STEP_NUM_TASKS', 'slurm'), ('OMPI_COMM_WORLD_SIZE', 'mpi'), ('PMI_SIZE', 'mpi')]
)
def test_other_processes_without_a_launcher_are_told(caplog, variable, launcher):
    assert read_placement('none', {variable: '1'}) is None
    assert not caplog.text
    assert read_placement('none', {variable: '2'}) is None
    assert f'{variable}=2' in caplog.text
    assert f'--launcher {launcher}' in caplog.text


@pytest.mark.parametrize(
    ('launcher', 'variables', 'missing'),
    [
        *(('pytorch', TORCHRUN, name) for name in TORCHRUN),
        *(('slurm', SLURM, name) for name in SLURM),
        *(('mpi', OPEN_MPI, name) for name in OPEN_MPI),
        ('mpi', MVAPICH, 'MV2_COMM_WORLD_SIZE'),
        ('mpi', HYDRA, 'MPI_LOCALNRANKS'),
    ],
)
def test_a_missing_variable_is_named(launcher, variables, missing):
    missing_there = {name: value for name, value in variables.items() if name != missing}
    name = 'SLURM_STEP_NODELIST' if missing == 'SLURM_JOB_NODELIST' else missing
    with pytest.raises(LaunchError, match=f'--launcher {launcher}: {name} is not set'):
        read_placement(launcher, missing_there)


def test_no_mpi():
    with pytest.raises(LaunchError, match=r'none of OMPI_COMM_WORLD_RANK, MV2_COMM_WORLD_RANK, PMI_RANK .*mpirun'):
        read_placement('mpi', {})


@pytest.mark.parametrize(
    ('launcher', 'variables', 'changed', 'message'),
    [
        ('pytorch', TORCHRUN, {'RANK': '8'}, r'RANK=8: .*0 to 7 \(below WORLD_SIZE=8\)'),
        ('pytorch', TORCHRUN, {'RANK': '-1'}, r'RANK=-1: .*0 to 7'),
        ('pytorch', TORCHRUN, {'WORLD_SIZE': '0'}, r'WORLD_SIZE=0: .*at least 1'),
        ('pytorch', TORCHRUN, {'WORLD_SIZE': 'two'}, r'WORLD_SIZE=two: expected a whole number'),
        ('pytorch', TORCHRUN, {'LOCAL_RANK': '4'}, r'LOCAL_RANK=4: .*0 to 3 \(below LOCAL_WORLD_SIZE=4\)'),
        ('pytorch', TORCHRUN, {'LOCAL_WORLD_SIZE': '9'}, r'LOCAL_WORLD_SIZE=9: .*1 to 8'),
        ('pytorch', TORCHRUN, {'MASTER_PORT': '65536'}, r'MASTER_PORT=65536: .*1 to 65535'),
        ('slurm', SLURM, {'SLURM_PROCID': '8'}, r'SLURM_PROCID=8: .*0 to 7'),
        ('slurm', SLURM, {'SLURM_LOCALID': '4'}, r'SLURM_LOCALID=4: .*below SLURM_NTASKS_PER_NODE=4'),
        ('slurm', SLURM, {'SLURM_JOB_NODELIST': 'gpu[07'}, r"--launcher slurm: SLURM_JOB_NODELIST: found 'gpu\[07'"),
        ('slurm', SLURM, {'SLURM_STEP_TASKS_PER_NODE': '4', 'SLURM_NODEID': '0'}, r'=4: expected 8 tasks in all'),
        ('slurm', SLURM, {'SLURM_STEP_TASKS_PER_NODE': '4(x2)', 'SLURM_NODEID': '2'}, r'SLURM_NODEID=2: .*0 to 1'),
        ('slurm', SLURM, {'SLURM_STEP_TASKS_PER_NODE': '4x2'}, r'PER_NODE=4x2: expected numbers of tasks'),
        ('mpi', OPEN_MPI, {'OMPI_COMM_WORLD_LOCAL_SIZE': '16'}, r'OMPI_COMM_WORLD_LOCAL_SIZE=16: .*1 to 8'),
        ('mpi', OPEN_MPI, {'MASTER_ADDR': ''}, r'MASTER_ADDR is not set.*OMPI_COMM_WORLD_LOCAL_SIZE=4'),
    ],
)
def test_contradictions_are_named(launcher, variables, changed, message):
    with pytest.raises(LaunchError, match=message):
        read_placement(launcher, {**variables, **changed})


@pytest.mark.parametrize(
    ('counts', 'node', 'local_world_size'), [('4(x2)', 1, 4), ('2(x3),1(x2)', 3, 1), ('3,5', 0, 3), ('8', 0, 8)]
)
def test_a_step_may_have_another_number_of_tasks_on_each_node(counts, node, local_world_size):
    step = {'SLURM_STEP_TASKS_PER_NODE': counts, 'SLURM_NODEID': str(node), 'SLURM_LOCALID': '0'}
    assert read_placement('slurm', {**SLURM, **step}).local_world_size == local_world_size


def test_a_step_may_have_fewer_tasks_than_its_job():
    step = {'SLURM_STEP_NUM_TASKS': '6', 'SLURM_STEP_TASKS_PER_NODE': '3(x2)', 'SLURM_NODEID': '1'}
    placement = read_placement('slurm', {**SLURM, **step})
    assert (placement.world_size, placement.local_world_size) == (6, 3)


def test_ports_of_jobs():
    ports = [read_placement('slurm', {**SLURM, 'SLURM_JOB_ID': str(job)}).master_port for job in range(1000, 1040)]
    assert set(ports) <= set(DERIVED_PORTS)
    assert len(set(ports)) == len(ports)  # jobs that run at the same time have similar numbers
    steps = [read_placement('slurm', {**SLURM, 'SLURM_STEP_ID': str(step)}).master_port for step in range(4)]
    assert len(set(steps)) == len(steps)
    jobs = [read_placement('mpi', {**OPEN_MPI, 'PMIX_NAMESPACE': f'host-{job}@1'}).master_port for job in range(4)]
    assert len(set(jobs)) == len(jobs)


def test_the_port_of_the_config_comes_first():
    assert read_placement('slurm', {**SLURM, 'MASTER_PORT': '77'}, port=5000).master_port == 5000
    assert read_placement('mpi', OPEN_MPI, port=5000).master_port == 5000
    for port in (0, 65536, '5000', True):
        with pytest.raises(LaunchError, match=r'dist_params\.port: found'):
            read_placement('slurm', SLURM, port=port)


def test_mpi_on_one_node_needs_no_address():
    alone = {**OPEN_MPI, 'OMPI_COMM_WORLD_RANK': '3', 'OMPI_COMM_WORLD_LOCAL_SIZE': '8', 'MASTER_ADDR': ''}
    assert read_placement('mpi', alone).master_address == '127.0.0.1'


def test_unknown_launcher():
    with pytest.raises(LaunchError, match=r"'flyte', expected one of none, pytorch, slurm, mpi"):
        read_placement('flyte', {})


@pytest.mark.parametrize(
    ('text', 'names'),
    [
        ('login', ['login']),
        ('node[01-03,7],login', ['node01', 'node02', 'node03', 'node7', 'login']),
        ('a[8-11]', ['a8', 'a9', 'a10', 'a11']),
        ('a[098-101].cluster,b', ['a098.cluster', 'a099.cluster', 'a100.cluster', 'a101.cluster', 'b']),
        ('rack[1-2]node[0,2]', ['rack1node0', 'rack1node2', 'rack2node0', 'rack2node2']),
        ('gpu-a-1,gpu-a-2', ['gpu-a-1', 'gpu-a-2']),
    ],
)
def test_node_lists(text, names):
    assert expand_node_list(text) == names


@pytest.mark.parametrize('text', ['', 'a[1-2', 'a]1', 'a[2-1]', 'a[x]', 'a,,b', 'a[1-2]]', 'a b', 'a[]', ','])
def test_broken_node_lists(text):
    with pytest.raises(LaunchError, match='expected'):
        expand_node_list(text)


def test_scontrol_is_asked_where_it_is(tmp_path, monkeypatch):
    program = tmp_path / 'scontrol'
    program.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && printf "from-%s\\nother\\n" "$3"\n')
    program.chmod(0o755)
    monkeypatch.setattr(environment.shutil, 'which', lambda name: str(tmp_path / name))
    assert environment.node_names('a[1-2]') == ['from-a[1-2]', 'other']
    program.write_text('#!/bin/sh\nexit 1\n')
    assert subprocess.run([program]).returncode == 1
    assert environment.node_names('a[1-2]') == ['a1', 'a2']
