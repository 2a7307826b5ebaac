"""Fields of the manifests in cluster/deploy/ as JSON schemas: those of ray.io/v1 (KubeRay 1.6.2) and of Kubernetes' own
types that are in use. Unknown fields are refused, as `kubectl apply` does."""

from typing import Any

TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
ANYTHING: dict[str, Any] = {}
# No underscores at the ends, at most 63 characters after the prefix.
LABELS = {
    "type": "object",
    "propertyNames": {"pattern": r"^([a-z0-9.-]+/)?[A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?$"},
    "additionalProperties": {"type": "string", "pattern": r"^([A-Za-z0-9]([\w.-]{0,61}[A-Za-z0-9])?)?$"},
}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[KMGT]i?)?$"}}


def choice(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


def many(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


def fields(*required: str, **known: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": known, "additionalProperties": False}


CONTAINER = fields(
    "name", "image", "resources",
    name=TEXT, image=TEXT,
    env=many(fields("name", "value", name=TEXT, value=TEXT)),
    resources=fields("requests", "limits", requests=QUANTITIES, limits=QUANTITIES),
    securityContext=fields(allowPrivilegeEscalation=FLAG, capabilities=fields(drop=many(TEXT))),
    volumeMounts=many(fields("name", "mountPath", name=TEXT, mountPath=TEXT)),
)  # fmt: skip
POD = fields(
    "spec",
    metadata=ANYTHING,
    spec=fields(
        "containers",
        containers=many(CONTAINER),
        automountServiceAccountToken=FLAG,
        securityContext=fields(runAsNonRoot=FLAG, runAsUser=NUMBER, fsGroup=NUMBER),
        nodeSelector=LABELS,
        tolerations=many(
            fields(key=TEXT, operator=choice("Exists", "Equal"), value=TEXT,
                   effect=choice("NoSchedule", "PreferNoSchedule", "NoExecute"))
        ),
        terminationGracePeriodSeconds=NUMBER,
        volumes=many(fields("name", name=TEXT, persistentVolumeClaim=fields("claimName", claimName=TEXT))),
    ),
)  # fmt: skip
SERVICES = choice("ClusterIP", "NodePort", "LoadBalancer")
HEAD = fields("template", template=POD, labels=LABELS, rayStartParams=TEXTS, serviceType=SERVICES)
WORKERS = fields(
    "groupName", "template", "minReplicas", "maxReplicas",
    groupName=TEXT, replicas=NUMBER, minReplicas=NUMBER, maxReplicas=NUMBER, idleTimeoutSeconds=NUMBER,
    labels=LABELS, rayStartParams=TEXTS, template=POD,
)  # fmt: skip
CLUSTER = fields(
    "headGroupSpec", "rayVersion", "authOptions",
    authOptions=fields(mode=choice("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    autoscalerOptions=fields(
        resources=ANYTHING, idleTimeoutSeconds=NUMBER, version=choice("v1", "v2"),
        upscalingMode=choice("Default", "Aggressive", "Conservative"),
    ),
    enableInTreeAutoscaling=FLAG, headGroupSpec=HEAD, rayVersion=TEXT, workerGroupSpecs=many(WORKERS),
)  # fmt: skip
JOB = fields(
    "rayClusterSpec", "entrypoint",
    activeDeadlineSeconds=NUMBER, backoffLimit=NUMBER, rayClusterSpec=CLUSTER, submitterPodTemplate=POD,
    entrypoint=TEXT, submissionMode=choice("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    ttlSecondsAfterFinished=NUMBER, preRunningDeadlineSeconds=NUMBER, shutdownAfterJobFinishes=FLAG,
)  # fmt: skip
CLAIM = fields(
    "accessModes", "resources",
    accessModes=many(choice("ReadWriteOnce", "ReadWriteOncePod", "ReadOnlyMany", "ReadWriteMany")),
    resources=fields("requests", requests=QUANTITIES), storageClassName=TEXT,
)  # fmt: skip


def manifest(version: str, kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    name = {"type": "string", "pattern": r"^[a-z]([a-z0-9-]{0,45}[a-z0-9])?$"}
    named = fields("name", name=name, namespace=TEXT, labels=LABELS)
    return fields(
        "apiVersion", "kind", "metadata", "spec",
        apiVersion={"const": version}, kind={"const": kind}, metadata=named, spec=spec,
    )  # fmt: skip


MANIFESTS = {
    "RayCluster": manifest("ray.io/v1", "RayCluster", CLUSTER),
    "RayJob": manifest("ray.io/v1", "RayJob", JOB),
    "PersistentVolumeClaim": manifest("v1", "PersistentVolumeClaim", CLAIM),
}
