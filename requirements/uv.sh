#!/bin/sh
# uv as this project uses it: with the Python that is here, and with pip's configuration where uv has none.
#
# uv reads neither pip's configuration nor the variables that pip reads, so behind a company's mirror or
# proxy pip works and uv does not. What the user set for uv itself always wins.
set -eu

pip_configuration=$("${PYTHON:-python3}" -m pip config list 2>/dev/null || true)

pip_setting() { # the strongest value of a setting, in pip's own order
    for section in :env: install global; do
        value=$(printf '%s\n' "$pip_configuration" | sed -n "s/^$section\.$1='\(.*\)'\$/\1/p")
        [ -z "$value" ] || { printf '%s' "$value"; return; }
    done
}

# Sets a variable unless it is set or the value is empty.
default() { eval "[ -n \"\${$1:-}\" ]" || [ -z "$2" ] || export "$1=$2"; }

[ -n "${UV_INDEX_URL:-}" ] || default UV_DEFAULT_INDEX "$(pip_setting index-url)"
default HTTPS_PROXY "${https_proxy:-$(pip_setting proxy)}"
default HTTP_PROXY "${http_proxy:-$(pip_setting proxy)}"
default SSL_CERT_FILE "$(pip_setting cert)"
default SSL_CERT_FILE "${REQUESTS_CA_BUNDLE:-${CURL_CA_BUNDLE:-}}"
for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do
    [ ! -e "$bundle" ] || default UV_SYSTEM_CERTS true # without one, uv's own list of authorities serves
done

export UV_PYTHON_DOWNLOADS=never
exec .tools/uv/bin/uv "$@"
