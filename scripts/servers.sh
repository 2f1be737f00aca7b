# Sourced, not run: finds or starts the PostgreSQL and Redis that tests and the smoke test need.
#
#   servers_up    leaves TEST_DATABASE_URL and TEST_REDIS_URL set, each naming a server that answers: the one of
#                 the environment, else a private one on a free port of 127.0.0.1 with its files in a temporary folder
#   servers_down  stops what servers_up started, by process id, and removes the folder
#
# The database user may create databases. Written for bash 3.2 (macOS) and later, with no client programs.

servers_dir=""
servers_pg_pid=""
servers_redis_pid=""

servers_say() { printf '%s\n' "$*" >&2; }

# Bytes of a TCP answer: host, port, a printf text to send, how many bytes to read. Fails when nobody answers.
servers_ask() {
    local limit=""
    command -v timeout >/dev/null 2>&1 && limit="timeout 5"
    # shellcheck disable=SC2016,SC2086  # the inner shell expands its own arguments; $limit is two words or none
    $limit bash -c 'exec 3<>"/dev/tcp/$1/$2" || exit 1
        printf "$3" >&3
        IFS= read -r -t 5 -n "$4" answer <&3 && printf "%s" "$answer"' ask "$1" "$2" "$3" "$4" 2>/dev/null
}

# "host port" of a URL, or nothing when it names no host (a socket folder, for example): url, default port.
servers_host_port() {
    local rest="${1#*://}"
    rest="${rest%%/*}"
    rest="${rest%%\?*}"
    rest="${rest##*@}"
    case "$rest" in
        "" | :*) return 0 ;;
        \[*\]:*) printf '%s %s\n' "$(printf '%s' "${rest%%]*}" | tr -d '[')" "${rest##*:}" ;;
        \[*\]) printf '%s %s\n' "$(printf '%s' "$rest" | tr -d '[]')" "$2" ;;
        *:*) printf '%s %s\n' "${rest%%:*}" "${rest##*:}" ;;
        *) printf '%s %s\n' "$rest" "$2" ;;
    esac
}

# PostgreSQL answers an SSLRequest with one byte, S or N, whoever asks.
servers_pg_answers() {
    local at
    at="$(servers_host_port "$1" 5432)"
    [ -z "$at" ] && return 0 # a socket: the tests will tell
    # shellcheck disable=SC2086
    case "$(servers_ask $at '\000\000\000\010\004\322\026\057' 1)" in S | N) return 0 ;; *) return 1 ;; esac
}

# Redis answers PING with +PONG, or with an error when it wants a password first; both prove that it is there.
servers_redis_answers() {
    local at
    at="$(servers_host_port "$1" 6379)"
    [ -z "$at" ] && return 0
    # With TLS the answer cannot be read here: the handshake is left to the tests.
    case "$1" in rediss://*) return 0 ;; esac
    # shellcheck disable=SC2086
    case "$(servers_ask $at 'PING\r\n' 1)" in + | -) return 0 ;; *) return 1 ;; esac
}

# A port nobody listens on. Another process may take it before we do: callers try again.
servers_free_port() {
    local port
    while :; do
        port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
        (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    done
    printf '%s\n' "$port"
}

servers_secret() { od -An -tx1 -N16 /dev/urandom | tr -d ' \n'; }

# The folder of the newest PostgreSQL (15 or later) with initdb, postgres and pg_ctl side by side; nothing if none.
servers_find_pg() {
    local found best=0 dir version
    found=""
    for dir in \
        "$(dirname "$(readlink -f "$(command -v initdb 2>/dev/null)" 2>/dev/null)" 2>/dev/null)" \
        /usr/lib/postgresql/*/bin /usr/pgsql-*/bin \
        /opt/homebrew/opt/postgresql@*/bin /usr/local/opt/postgresql@*/bin; do
        [ -x "$dir/initdb" ] && [ -x "$dir/postgres" ] && [ -x "$dir/pg_ctl" ] || continue
        version="$("$dir/postgres" --version | sed 's/[^0-9]*\([0-9]*\).*/\1/')"
        if [ "${version:-0}" -ge 15 ] && [ "$version" -gt "$best" ]; then
            best="$version"
            found="$dir"
        fi
    done
    printf '%s\n' "$found"
}

# PostgreSQL refuses to run as root. Runs a command as the account that owns its files.
servers_as_pg() {
    if [ "$(id -u)" -ne 0 ]; then
        "$@"
    elif command -v runuser >/dev/null 2>&1; then
        runuser -u "$servers_pg_user" -- "$@"
    elif command -v setpriv >/dev/null 2>&1; then
        setpriv --reuid="$(id -u "$servers_pg_user")" --regid="$(id -g "$servers_pg_user")" --clear-groups -- "$@"
    else
        su -s /bin/sh "$servers_pg_user" -c "$(printf '%q ' "$@")"
    fi
}

servers_start_pg() {
    local bin="$1" data="$servers_dir/pg/data" password port attempt
    password="$(servers_secret)"
    mkdir -p "$servers_dir/pg"
    (umask 077 && printf '%s\n' "$password" >"$servers_dir/pg/password")
    if [ "$(id -u)" -eq 0 ]; then
        servers_pg_user=postgres
        id -u "$servers_pg_user" >/dev/null 2>&1 || servers_pg_user=nobody
        chmod 711 "$servers_dir"
        chown -R "$servers_pg_user" "$servers_dir/pg"
    fi
    # The password file belongs to that account by now; --no-sync is about the empty cluster only, the server syncs.
    (cd "$servers_dir/pg" && servers_as_pg "$bin/initdb" --pgdata "$data" --username wearsync --pwfile password \
        --auth scram-sha-256 --encoding UTF8 --locale C --no-sync) >"$servers_dir/initdb.log" 2>&1 || {
        cat "$servers_dir/initdb.log" >&2
        return 1
    }
    rm -f "$servers_dir/pg/password"
    for attempt in 1 2 3 4 5; do
        port="$(servers_free_port)"
        # Many tests at once, each with a database and a pool of its own.
        if (cd "$servers_dir/pg" && servers_as_pg "$bin/pg_ctl" start --silent --wait --pgdata "$data" --log "$servers_dir/pg/log" \
            --options "-c listen_addresses=127.0.0.1 -c port=$port -c unix_socket_directories='' -c max_connections=300 -c fsync=on") \
            >/dev/null 2>&1; then
            servers_pg_pid="$(head -n 1 "$data/postmaster.pid")"
            export TEST_DATABASE_URL="postgres://wearsync:$password@127.0.0.1:$port/postgres"
            return 0
        fi
    done
    servers_say "PostgreSQL did not start ($attempt attempts); its log:"
    cat "$servers_dir/pg/log" >&2
    return 1
}

servers_start_redis() {
    local program="$1" password port attempt _
    password="$(servers_secret)"
    mkdir -p "$servers_dir/redis"
    for attempt in 1 2 3 4 5; do
        port="$(servers_free_port)"
        # Settings by standard input: an argument list, password included, is visible to everybody on the machine.
        "$program" - >"$servers_dir/redis/log" 2>&1 <<CONF &
bind 127.0.0.1
port $port
dir $servers_dir/redis
requirepass $password
save ""
appendonly no
maxmemory-policy noeviction
CONF
        servers_redis_pid=$!
        for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
            kill -0 "$servers_redis_pid" 2>/dev/null || break
            if servers_redis_answers "redis://127.0.0.1:$port"; then
                export TEST_REDIS_URL="redis://default:$password@127.0.0.1:$port/0"
                return 0
            fi
            sleep 0.25
        done
        kill "$servers_redis_pid" 2>/dev/null || true
        wait "$servers_redis_pid" 2>/dev/null || true
        servers_redis_pid=""
    done
    servers_say "Redis did not start ($attempt attempts); its log:"
    cat "$servers_dir/redis/log" >&2
    return 1
}

# Only in CI: nobody else's machine is changed.
servers_install() {
    local sudo=""
    command -v apt-get >/dev/null 2>&1 || return 1
    [ "$(id -u)" -eq 0 ] || sudo="sudo -n"
    servers_say "CI=true: installing postgresql and redis-server"
    # shellcheck disable=SC2086
    $sudo apt-get update -qq >&2 &&
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql redis-server >&2
}

servers_up() {
    local pg="" redis=""
    if [ -n "${TEST_DATABASE_URL:-}" ]; then
        servers_pg_answers "$TEST_DATABASE_URL" || {
            servers_say "TEST_DATABASE_URL is set, but no PostgreSQL answers there"
            return 1
        }
        export TEST_DATABASE_URL
    fi
    if [ -n "${TEST_REDIS_URL:-}" ]; then
        servers_redis_answers "$TEST_REDIS_URL" || {
            servers_say "TEST_REDIS_URL is set, but no Redis answers there"
            return 1
        }
        export TEST_REDIS_URL
    fi
    [ -n "${TEST_DATABASE_URL:-}" ] && [ -n "${TEST_REDIS_URL:-}" ] && return 0

    pg="$(servers_find_pg)"
    redis="$(command -v redis-server || true)"
    if { [ -z "${TEST_DATABASE_URL:-}" ] && [ -z "$pg" ]; } || { [ -z "${TEST_REDIS_URL:-}" ] && [ -z "$redis" ]; }; then
        if [ "${CI:-}" = true ] && servers_install; then
            pg="$(servers_find_pg)"
            redis="$(command -v redis-server || true)"
        fi
    fi
    if [ -z "${TEST_DATABASE_URL:-}" ] && [ -z "$pg" ]; then
        servers_say "no PostgreSQL 15 or later found. Set TEST_DATABASE_URL (its user must be allowed to create databases),"
        servers_say "or install one; it need not run:"
        servers_say "  Debian, Ubuntu:  apt-get install postgresql"
        servers_say "  macOS:           brew install postgresql@16"
        return 1
    fi
    if [ -z "${TEST_REDIS_URL:-}" ] && [ -z "$redis" ]; then
        servers_say "no Redis found. Set TEST_REDIS_URL, or install one; it need not run:"
        servers_say "  Debian, Ubuntu:  apt-get install redis-server"
        servers_say "  macOS:           brew install redis"
        return 1
    fi

    servers_dir="$(mktemp -d "${TMPDIR:-/tmp}/wearsync-servers.XXXXXX")"
    if [ -z "${TEST_DATABASE_URL:-}" ]; then servers_start_pg "$pg" || return 1; fi
    if [ -z "${TEST_REDIS_URL:-}" ]; then servers_start_redis "$redis" || return 1; fi
}

# Never fails, and leaves the exit status of whoever it runs after alone.
servers_down() {
    local pid left
    set +e
    # INT asks PostgreSQL for a fast shut-down: open connections are ended.
    [ -n "$servers_pg_pid" ] && kill -INT "$servers_pg_pid" 2>/dev/null
    [ -n "$servers_redis_pid" ] && kill -TERM "$servers_redis_pid" 2>/dev/null
    for pid in $servers_pg_pid $servers_redis_pid; do
        left=100
        while kill -0 "$pid" 2>/dev/null; do
            if [ "$left" -eq 0 ]; then
                kill -KILL "$pid" 2>/dev/null
                break
            fi
            sleep 0.1
            left=$((left - 1))
        done
    done
    servers_pg_pid=""
    servers_redis_pid=""
    [ -n "$servers_dir" ] && rm -rf "$servers_dir"
    servers_dir=""
}
