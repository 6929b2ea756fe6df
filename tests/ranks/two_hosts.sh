#!/bin/bash
# Two ranks on two hosts, which are network namespaces joined by a pair of virtual Ethernet devices: the losses of one
# rank; and a host whose link goes down ends both ranks within --rank-timeout with a state that continues.
#   tests/ranks/two_hosts.sh BUILD_DIR [PROGRAM]      needs root and iproute2, else exit 77
set -u
BUILD=$(cd "${1:?usage: two_hosts.sh BUILD_DIR [PROGRAM]}" && pwd)
PARE=${2:-$BUILD/pare}
A=pare-a-$$ B=pare-b-$$ NET=10.213.77
none() { echo "no $* here"; exit 77; }
[ "$(id -u)" = 0 ] && command -v ip >/dev/null && ip netns add "$A" 2>/dev/null || none "network namespaces"
T=$(mktemp -d)
trap 'ip netns del "$A"; ip netns del "$B" 2>/dev/null; rm -rf "$T"' EXIT
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
FAILED=0
fail() { echo "FAILED $*"; FAILED=1; }

ip netns add "$B" && ip link add pa$$ netns "$A" type veth peer name pb$$ netns "$B" || none "veth devices"
ip -n "$A" addr add $NET.1/24 dev pa$$ && ip -n "$B" addr add $NET.2/24 dev pb$$
for host in "$A pa$$" "$B pb$$"; do
  set -- $host
  ip -n "$1" link set lo up
  ip -n "$1" link set "$2" up
done

"$BUILD/tests/make_tiny_model" "$T/model" && "$BUILD/tests/make_tiny_model" --text "$T/text" 120 || exit 1
train() { # OUT STEPS [MORE...]
  local out=$1 steps=$2
  shift 2
  exec "$PARE" train --model "$T/model" --text "$T/text" --split '<|endoftext|>' --steps "$steps" --batch 6 --context 64 \
    --lr 0.003 --checkpoint-minutes 0 --out "$T/$out" "$@"
}
rank() { # HOST RANK OUT STEPS [MORE...]
  export RANK=$2 WORLD_SIZE=2 MASTER_ADDR=$NET.1 MASTER_PORT=29400
  export -f train
  export PARE T
  local host=$1
  shift 2
  exec ip netns exec "$host" bash -c 'train "$@"' train "$@"
}
losses() { sed -n 's/.*"loss":\([-0-9.e]*\).*/\1/p' "$T/$1/train.jsonl"; }

(train one 12) >"$T/one.log" 2>&1 || { fail "one rank"; cat "$T/one.log"; }
(rank "$A" 0 two 12) >"$T/a.log" 2>&1 &
first=$!
(rank "$B" 1 two 12) >"$T/b.log" 2>&1 || { fail "rank 1"; cat "$T/b.log"; }
wait $first || { fail "rank 0"; cat "$T/a.log"; }
paste <(losses one) <(losses two) | awk '{ d = $1 - $2; if (d < 0) d = -d; if (d > most) most = d; n++ }
  END { printf "two hosts: %d steps, losses differ by at most %g\n", n, most; exit !(n == 12 && most < 2e-5) }' ||
  fail "other losses"

(rank "$A" 0 cut 100000 --rank-timeout 5) >"$T/a.log" 2>&1 &
first=$!
(rank "$B" 1 cut 100000 --rank-timeout 5) >"$T/b.log" 2>&1 &
second=$!
for ((i = 0; i < 600; ++i)); do [ -e "$T/cut.partial/training_state.safetensors" ] && break; sleep 0.1; done
ip -n "$B" link set pb$$ down
begin=$(date +%s)
wait $first
[ $? = 1 ] || fail "rank 0 did not end with an error"
wait $second
[ $? = 1 ] || fail "rank 1 did not end with an error"
took=$(($(date +%s) - begin))
echo "a link that goes down: both ranks ended after $took s"
[ $took -le 30 ] || fail "that is too late"
grep -h "pare train" "$T/a.log" "$T/b.log"
grep -q "rank 1 ended without a word or cannot be reached" "$T/a.log" || fail "rank 0 does not name rank 1"
grep -q "rank 0 ended without a word or cannot be reached" "$T/b.log" || fail "rank 1 does not name rank 0"
[ -e "$T/cut.partial/training_state.safetensors" ] || fail "no state was kept"
[ $FAILED = 0 ]
