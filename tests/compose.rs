//! Reads `docker-compose.yml` as Docker would and checks what a start on a fresh clone rests on. No Docker needed;
//! `scripts/compose-without-docker` starts the same processes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use saphyr::{LoadableYamlNode, Yaml};

fn read(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).expect(file)
}

/// The value of a key, merge keys (`<<`) followed; the nearest wins.
fn get<'a>(map: &'a Yaml<'a>, key: &str) -> Option<&'a Yaml<'a>> {
    map.as_mapping_get(key).or_else(|| map.as_mapping_get("<<").and_then(|merged| get(merged, key)))
}

/// The keys of a mapping, those of merge keys included.
fn keys(map: &Yaml<'_>) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    for (key, value) in map.as_mapping().expect("a mapping") {
        match key.as_str().expect("text as key") {
            "<<" => out.extend(keys(value)),
            key => {
                out.insert(key.to_owned());
            }
        }
    }
    out
}

/// The texts of a list; none when it is not there.
fn list(map: &Yaml<'_>, key: &str) -> Vec<String> {
    let items = get(map, key).and_then(Yaml::as_sequence).map(Vec::as_slice).unwrap_or_default();
    items.iter().map(|item| item.as_str().expect("a list of texts").to_owned()).collect()
}

/// What a service waits for, as `service: condition`.
fn waits_for(service: &Yaml<'_>) -> Vec<String> {
    let on = get(service, "depends_on").expect("depends_on");
    let condition = |name: &String| get(get(on, name)?, "condition")?.as_str().map(|c| format!("{name}: {c}"));
    keys(on).iter().map(|name| condition(name).expect("a condition")).collect()
}

/// Runs a check over the parsed file.
fn with_compose(check: impl FnOnce(&Yaml<'_>)) {
    let text = read("docker-compose.yml");
    let documents = Yaml::load_from_str(&text).expect("docker-compose.yml is YAML");
    assert_eq!(documents.len(), 1);
    check(&documents[0]);
}

fn service<'a>(compose: &'a Yaml<'a>, name: &str) -> &'a Yaml<'a> {
    get(compose, "services").and_then(|services| get(services, name)).expect(name)
}

const SERVICES: [&str; 6] = ["api", "init", "postgres", "redis", "worker-1", "worker-2"];

#[test]
fn services_are_these() {
    with_compose(|compose| {
        let names = keys(get(compose, "services").expect("services"));
        assert_eq!(names, SERVICES.map(str::to_owned).into());
    });
}

#[test]
fn only_the_api_is_published_and_only_here() {
    with_compose(|compose| {
        for name in SERVICES {
            let ports = list(service(compose, name), "ports");
            if name == "api" {
                assert_eq!(ports, ["127.0.0.1:8000:8000"]);
            } else {
                assert_eq!(ports, [""; 0], "{name}");
            }
            assert!(get(service(compose, name), "network_mode").is_none(), "{name}");
        }
        // Inside its container the API has to listen on the container's address.
        let settings = get(service(compose, "api"), "environment").expect("environment");
        assert_eq!(get(settings, "WEARSYNC_BIND").and_then(Yaml::as_str), Some("0.0.0.0:8000"));
        assert_eq!(list(service(compose, "api"), "command"), ["serve", "--no-worker"]);
    });
}

/// They ask for no password, so nothing but ours may reach them.
#[test]
fn database_and_redis_are_on_an_internal_network() {
    with_compose(|compose| {
        let network = get(compose, "networks").and_then(|networks| get(networks, "servers")).expect("servers");
        assert_eq!(get(network, "internal").and_then(Yaml::as_bool), Some(true));
        for name in ["postgres", "redis"] {
            assert_eq!(list(service(compose, name), "networks"), ["servers"], "{name}");
            assert!(get(service(compose, name), "healthcheck").is_some(), "{name}");
            assert_eq!(list(service(compose, name), "volumes").len(), 1, "{name}");
        }
        let redis = list(service(compose, "redis"), "command").join(" ");
        assert!(redis.contains("--maxmemory-policy noeviction") && redis.contains("--appendonly yes"), "{redis}");
    });
}

#[test]
fn one_of_two_workers_owns_the_files() {
    with_compose(|compose| {
        let mut commands: Vec<_> =
            ["worker-1", "worker-2"].map(|w| list(service(compose, w), "command").join(" ")).into();
        commands.sort();
        assert_eq!(commands, ["worker", "worker --export"]);
        for name in SERVICES {
            let service = service(compose, name);
            let writes_files = list(service, "command").join(" ") == "worker --export";
            let has_the_volume = list(service, "volumes").iter().any(|volume| volume.starts_with("exports:"));
            assert_eq!(writes_files, has_the_volume, "{name}");
        }
    });
}

#[test]
fn init_comes_between_the_servers_and_the_rest() {
    with_compose(|compose| {
        let servers = ["postgres: service_healthy", "redis: service_healthy"];
        assert_eq!(waits_for(service(compose, "init")), servers);
        for name in ["api", "worker-1", "worker-2"] {
            let all = ["init: service_completed_successfully", servers[0], servers[1]];
            assert_eq!(waits_for(service(compose, name)), all, "{name}");
        }
        let init = service(compose, "init");
        assert_eq!(list(init, "entrypoint"), ["wearsync-first-start"]);
        assert_eq!(get(init, "restart").and_then(Yaml::as_str), Some("no"));
        // It alone writes the key.
        for name in SERVICES {
            let state: Vec<_> =
                list(service(compose, name), "volumes").into_iter().filter(|v| v.starts_with("state:")).collect();
            match name {
                "postgres" | "redis" => assert_eq!(state, [""; 0], "{name}"),
                "init" => assert_eq!(state, ["state:/state"]),
                _ => assert_eq!(state, ["state:/state:ro"], "{name}"),
            }
        }
    });
}

#[test]
fn no_secret_is_written_down() {
    with_compose(|compose| {
        for name in SERVICES {
            let Some(settings) = get(service(compose, name), "environment") else { continue };
            for key in keys(settings) {
                let value = get(settings, &key).expect("a key just listed");
                let secret = ["SECRET", "TOKEN", "PASSWORD", "CODE"].iter().any(|word| key.contains(word));
                let names_a_place = key.ends_with("_FILE") || key.ends_with("_URL");
                if secret && !names_a_place {
                    assert!(value.is_null(), "{name}: {key} must come from the environment");
                }
                // A URL with a password: scheme://user:password@host.
                let user = value.as_str().and_then(|v| v.split_once("://")).and_then(|(_, rest)| rest.split_once('@'));
                assert!(user.is_none_or(|(user, _)| !user.contains(':')), "{name}: {key} holds a password");
            }
        }
    });
}

/// Every setting of the services is one of the script, and the steps of `init` are the same file.
#[test]
fn script_without_docker_has_the_same_settings() {
    let script = read("scripts/compose-without-docker");
    with_compose(|compose| {
        for name in ["init", "api", "worker-1", "worker-2"] {
            let settings = get(service(compose, name), "environment").expect("environment");
            for key in keys(settings) {
                // Without a value: passed on from the environment, which the script's processes inherit.
                if get(settings, &key).is_some_and(|value| !value.is_null()) {
                    assert!(script.contains(&format!("export {key}=")), "{name}: {key}");
                }
            }
            let command = list(service(compose, name), "command").join(" ");
            assert!(name == "init" || script.contains(&format!("start {name} {command}\n")), "{name}: {command}");
        }
    });
    assert!(script.contains("scripts/first-start"));
    assert!(read("Dockerfile").contains("scripts/first-start /usr/local/bin/wearsync-first-start"));
}

/// The key file is the one place where the secret key is made for containers.
#[test]
fn first_start_makes_key_then_tables_then_api_key() {
    let script = read("scripts/first-start");
    let steps = [
        "umask 077",
        "\"$wearsync\" migrate",
        "\"$wearsync\" keys create --name first --scopes sync,read,admin --if-none",
    ];
    let at: Vec<_> = steps.iter().map(|step| script.find(step).expect(step)).collect();
    assert!(at.is_sorted(), "{at:?}");
}
