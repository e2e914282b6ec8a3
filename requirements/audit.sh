#!/bin/sh
# Are there known vulnerabilities in what the locks pin? Asks the OSV database (OSV_URL: a mirror of it).
#
# Exit codes: 0 none is known, 1 some are, 2 it could not be done, 3 the database does not answer. The last is not the
# first: nothing was audited.
set -u

export LC_ALL=C
report=$(mktemp)
trap 'rm -f "$report" "$report.err"' EXIT

.tools/audit/bin/pip-audit --vulnerability-service osv --osv-url "${OSV_URL:-https://api.osv.dev/v1/query}" \
    --disable-pip --require-hashes --progress-spinner off --timeout 20 --format markdown --desc off \
    -r requirements/dev.txt -r requirements/redis.txt -r requirements/bootstrap.txt \
    >"$report" 2>"$report.err"
code=$?

if [ "$code" -eq 0 ]; then
    tail -n 1 "$report.err"
elif [ -s "$report" ]; then # it has got answers
    cat "$report.err" "$report"
    code=1
elif grep -qE 'ServiceError|requests\.exceptions' "$report.err"; then
    echo "DEPENDENCIES WERE NOT AUDITED, the database does not answer: $(tail -n 1 "$report.err" | cut -c 1-200)" >&2
    code=3
else
    cat "$report.err" >&2
    code=2
fi
exit "$code"
