#!/usr/bin/env bash
# A Slurm cluster of two nodes, n0 and n1, made of this machine: to try the scripts of jobs/, and for the tests.
#
#   bash tools/slurm_cluster.sh up [FOLDER]        starts it; prints the line that lets sbatch and the others find it
#   bash tools/slurm_cluster.sh status [FOLDER]    its nodes and jobs; exit code 1 where it is not up
#   bash tools/slurm_cluster.sh down [FOLDER]      ends its jobs and daemons, removes the folder
#
# FOLDER (/run/hpcdit-slurm) holds all of it: configuration, key, sockets, logs. A Slurm of the machine's own stays as
# it is, and several clusters may run beside each other. Partitions: normal, and urgent, whose jobs preempt those of
# normal: they are asked to stop, and after 20 seconds requeued. `up` twice is `up`.
set -euo pipefail

nodes=(n0 n1)
limit_s=30 # for daemons to start and to end

say() {
    echo "slurm_cluster: $1" >&2
}

fail() {
    say "$1"
    exit 2
}

check() { # That a cluster can be made here.
    [ "$(id -u)" = 0 ] || fail "needs root: Slurm's daemons start jobs for every user"
    local program
    for program in munged slurmctld slurmd sbatch; do
        command -v "$program" >/dev/null ||
            fail "$program is missing: apt-get install --no-install-recommends slurm-wlm munge"
    done
}

free_ports() { # COUNT: prints ports that nobody listens on, below those that the system hands out.
    local port
    shuf -i 20000-32000 -n 200 | while read -r port; do
        (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || echo "$port"
    done | head -n "$1"
}

configure() {
    local host ports i
    host=$(hostname -s)
    mapfile -t ports < <(free_ports $((1 + ${#nodes[@]})))
    cat <<TEXT
ClusterName=hpcdit
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
# cred_expire: how long a job that is requeued waits, else 2 minutes.
AuthInfo=socket=$folder/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdSpoolDir=$folder/spool-%n
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdLogFile=$folder/slurmd-%n.log
SlurmdParameters=config_overrides
# Cores are not bound and memory is not watched: the nodes share this machine.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=pmi2
MailProg=/bin/true
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
# What happens to jobs that are to end: at once at the time limit, killed 15 seconds after SIGTERM.
OverTimeLimit=0
KillWait=15
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
TEXT
    for i in "${!nodes[@]}"; do
        echo "NodeName=${nodes[i]} NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[i + 1]} CPUs=4 State=UNKNOWN"
    done
    cat <<TEXT
PartitionName=normal Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
TEXT
}

within_limit() { # COMMAND...: until it succeeds.
    local end=$((SECONDS + limit_s))
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

ready() {
    [ -e "$SLURM_CONF" ] || return 1 # sinfo would look for a Slurm of the site's, for a minute
    [ "$(sinfo --noheader --responding --partition=normal --format=%D 2>/dev/null)" = ${#nodes[@]} ]
}

up() {
    check
    ready && return
    down # what is left of one that broke
    [ -z "$(ls -A "$folder" 2>/dev/null)" ] || fail "$folder holds other things; allowed: a new or an empty folder"
    umask 022
    mkdir -p "$folder/state" "${nodes[@]/#/$folder/spool-}"
    configure >"$SLURM_CONF"
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    # --force: also in a folder that is closed to other users.
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed" --num-threads=2 2>>"$folder/munged.log"
    slurmctld
    local node
    for node in "${nodes[@]}"; do
        slurmd -N "$node"
    done
    within_limit ready || fail "the nodes are not ready after $limit_s s, see $folder/*.log"
}

status() {
    ready || { say "not up: $folder" && exit 1; }
    sinfo --format="%9P %5D %8T %N"
    echo
    squeue --format="%8i %9P %16j %10T %10M %.3D %R"
}

# The cluster's processes: daemons and the keepers of job steps, which run in the folder, and what jobs have started.
ours() {
    local found pid
    grep -lzxFs "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ | while IFS=/ read -r _ _ pid _; do
        if [ "$(readlink "/proc/$pid/cwd")" = "$folder" ] || grep -qzs '^SLURM_JOB_ID=' "/proc/$pid/environ"; then
            echo "$pid"
        fi
    done
    found=$(cat "$folder/munged.pid" 2>/dev/null) || return 0
    ! grep -qzFs "$folder" "/proc/$found/cmdline" || echo "$found"
}

no_jobs() {
    [ -z "$(squeue --noheader 2>/dev/null)" ]
}

nobody() {
    [ -z "$(ours)" ]
}

send() { # SIGNAL, to all of ours
    ours | xargs --no-run-if-empty kill "-$1" 2>/dev/null || true # who has ended meanwhile
}

down() {
    grep -qsxF "StateSaveLocation=$folder/state" "$SLURM_CONF" || return 0 # none of ours
    if ready; then
        squeue --noheader --format=%A | xargs --no-run-if-empty scancel
        within_limit no_jobs || say "jobs did not end within $limit_s s, they are killed"
    fi
    send TERM
    limit_s=5 within_limit nobody || { send KILL && within_limit nobody; } || fail "not ended: $(ours | xargs)"
    rm -rf "$folder"
}

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    fail "usage: bash tools/slurm_cluster.sh up|status|down [FOLDER]"
fi
folder=$(realpath -m "${2:-/run/hpcdit-slurm}")
export SLURM_CONF=$folder/slurm.conf
[[ $folder != *[[:space:],\;#]* ]] || fail "$folder: allowed: a folder without blanks and , ; #"
case $1 in
    up)
        up
        echo "export SLURM_CONF=$SLURM_CONF"
        ;;
    status) status ;;
    down) down ;;
    *) fail "$1: allowed: up, status, down" ;;
esac
