#!/bin/sh
# Runs every fuzz target for a while. Usage: tools/fuzz.sh PYTHON SECONDS [TARGET...]
#
# PYTHON has atheris; a TARGET is the name of tests/fuzz/fuzz_TARGET.py, all of them by default. Ends with the first
# crash and says how to repeat it. What a target finds goes to a scratch directory that stays after a crash; the corpus
# in the repository is read and never written.
set -eu
python=$1
seconds=$2
shift 2
case $python in
/*) ;;
*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;;
esac
cd "$(dirname "$0")/.."
"$python" -c 'import atheris' 2>/dev/null || {
	echo "fuzz: $python has no atheris: make fuzz installs it" >&2
	exit 1
}
scratch=$(mktemp -d "${TMPDIR:-/tmp}/spanloom-fuzz.XXXXXX")
trap 'rm -rf "$scratch"; exit 130' INT TERM

[ $# -gt 0 ] || set -- $(for file in tests/fuzz/fuzz_*.py; do basename "$file" .py | sed s/^fuzz_//; done)
for target; do
	found=$scratch/$target
	mkdir -p "$found/corpus"
	printf 'fuzz: %s for %s s\n' "$target" "$seconds"
	status=0
	"$python" "tests/fuzz/fuzz_$target.py" "-max_total_time=$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=16384 \
		-print_final_stats=1 "-artifact_prefix=$found/" "$found/corpus" "tests/fuzz/corpus/$target" \
		>"$found/log" 2>&1 || status=$?
	if [ "$status" -ne 0 ]; then
		tail -n 60 "$found/log" >&2
		echo "fuzz: $target failed (status $status); the whole log is $found/log" >&2
		for input in "$found"/crash-* "$found"/timeout-* "$found"/oom-*; do
			[ -e "$input" ] && echo "fuzz: repeat it with: $python tests/fuzz/fuzz_$target.py $input" >&2
		done
		exit 1
	fi
	awk '/stat::number_of_executed_units/ {runs = $2} /stat::peak_rss_mb/ {rss = $2}
		END {printf "fuzz: %s ok, %s runs, %s MB\n", "'"$target"'", runs, rss}' "$found/log"
done
rm -rf "$scratch"
