{{/* Names. A StatefulSet's may have 52 characters, for the hash that Kubernetes appends. */}}
{{- define "rocyard.fullname" -}}
{{- if contains "rocyard" .Release.Name -}}
{{ .Release.Name | trunc 24 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-rocyard" (.Release.Name | trunc 16 | trimSuffix "-") }}
{{- end -}}
{{- end }}

{{- define "rocyard.storeSecret" -}}
{{ .Values.store.existingSecret | default (printf "%s-store" (include "rocyard.fullname" .)) }}
{{- end }}

{{- define "rocyard.apiKeySecret" -}}
{{ .Values.apiKey.existingSecret | default (printf "%s-api-key" (include "rocyard.fullname" .)) }}
{{- end }}

{{/* Labels. Takes (list root component). */}}
{{- define "rocyard.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: rocyard
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- with index . 1 }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{- define "rocyard.labels" -}}
{{- $root := index . 0 -}}
{{ include "rocyard.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Takes (list image defaultTag). */}}
{{- define "rocyard.image" -}}
{{- $image := index . 0 -}}
{{- if $image.digest -}}
{{ printf "%s@%s" $image.repository $image.digest | quote }}
{{- else -}}
{{ printf "%s:%s" $image.repository ($image.tag | default (index . 1)) | quote }}
{{- end -}}
{{- end }}

{{/* What every pod has. Takes (list root part serviceAccount): `part` has nodeSelector and tolerations. */}}
{{- define "rocyard.pod" -}}
{{- $root := index . 0 -}}
{{- $part := index . 1 -}}
serviceAccountName: {{ index . 2 }}
enableServiceLinks: false  # variables of services look like settings
restartPolicy: Always
{{- with $root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with $part.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $part.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "rocyard.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "rocyard.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* Takes a part with cpu and memory. */}}
{{- define "rocyard.resources" -}}
requests:
  cpu: {{ .cpu | quote }}
  memory: {{ .memory | quote }}
limits:
  memory: {{ .memory | quote }}
{{- end }}

{{/* Variables of every role: what is the same for all stands in the ConfigMap. */}}
{{- define "rocyard.env" -}}
- name: ROCYARD_CONFIG
  value: /etc/rocyard/rocyard.yaml
{{- if .Values.tls.existingSecret }}
- name: ROCYARD_TLS__DIRECTORY
  value: /run/secrets/rocyard-tls
{{- end }}
{{- end }}

{{- define "rocyard.storeEnv" -}}
- name: ROCYARD_STORE__URL
  value: file:/run/secrets/rocyard/store-url
{{- end }}

{{/* The results store, for who keeps, reads or removes results. */}}
{{- define "rocyard.resultsEnvFrom" -}}
{{- with .Values.results.existingSecret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
{{- end }}

{{- define "rocyard.resultsMount" -}}
{{- if .Values.results.existingClaim }}
- name: results
  mountPath: {{ include "rocyard.resultsFolder" . }}
{{- end }}
{{- end }}

{{- define "rocyard.resultsVolume" -}}
{{- with .Values.results.existingClaim }}
- name: results
  persistentVolumeClaim:
    claimName: {{ . }}
{{- end }}
{{- end }}

{{- define "rocyard.resultsFolder" -}}
/var/lib/rocyard-results
{{- end }}

{{- define "rocyard.ownAddress" -}}
valueFrom:
  fieldRef:
    fieldPath: status.podIP
{{- end }}

{{- define "rocyard.mounts" -}}
- name: settings
  mountPath: /etc/rocyard
  readOnly: true
- name: data
  mountPath: /var/lib/rocyard
- name: tmp
  mountPath: /tmp
{{- if .Values.tls.existingSecret }}
- name: tls
  mountPath: /run/secrets/rocyard-tls
  readOnly: true
{{- end }}
{{- end }}

{{- define "rocyard.secretMount" -}}
- name: secrets
  mountPath: /run/secrets/rocyard
  readOnly: true
{{- end }}

{{/* Volumes of a role. Takes (list root role scratch). Mode 288 is 0440: the owner is root, and the pod's group may read. */}}
{{- define "rocyard.volumes" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
- name: settings
  configMap:
    name: {{ include "rocyard.fullname" $root }}-settings
- name: data
  emptyDir:
    sizeLimit: {{ index . 2 | quote }}
- name: tmp
  emptyDir:
    sizeLimit: {{ index . 2 | quote }}
{{- with $root.Values.tls.existingSecret }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 288
    items:
      - key: ca.pem
        path: ca.pem
      - key: {{ $role }}.pem
        path: {{ $role }}.pem
      - key: {{ $role }}.key
        path: {{ $role }}.key
{{- end }}
{{- end }}

{{/* A probe's HTTP request. Takes (list root path port). */}}
{{- define "rocyard.httpGet" -}}
httpGet:
  path: {{ index . 1 }}
  port: {{ index . 2 }}
  scheme: {{ ternary "HTTPS" "HTTP" (ne (index . 0).Values.tls.existingSecret "") }}
timeoutSeconds: 3
{{- end }}

{{- define "rocyard.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "rocyard.selector" . | nindent 8 }}
{{- end }}

{{/* Whether the autoscaler sets the number of nodes. */}}
{{- define "rocyard.scaled" -}}
{{- if and .Values.autoscaler.enabled (eq .Values.autoscaler.mode "active") }}true{{ end -}}
{{- end }}

{{/* A group with its defaults, as JSON. Takes (list root group). */}}
{{- define "rocyard.group" -}}
{{- $root := index . 0 -}}
{{- $defaults := dict
  "resource" "amd.com/gpu" "replicas" 1 "workersMin" 0 "workersMax" 10 "terminationGracePeriodSeconds" 600
  "cpu" "8" "memory" "64Gi" "shm" "8Gi" "scratch" "20Gi" "supplementalGroups" list "runtimeClassName" ""
  "nodeSelector" dict "tolerations" list "volumes" list "volumeMounts" list "labels" dict -}}
{{- $group := mustMergeOverwrite $defaults (deepCopy (index . 1)) -}}
{{- $_ := set $group "image" (mustMergeOverwrite (deepCopy $root.Values.image) (deepCopy ($group.image | default dict))) -}}
{{- $_ := set $group "gpu" (ne $group.resource "none") -}}
{{- if not (hasKey $group "hostPID") }}{{ $_ := set $group "hostPID" $group.gpu }}{{ end -}}
{{- toJson $group -}}
{{- end }}

{{/* The settings that all roles share, as YAML. */}}
{{- define "rocyard.settings" -}}
{{- $name := include "rocyard.fullname" . -}}
{{- $groups := dict -}}
{{- range $key, $given := .Values.groups -}}
{{- $group := include "rocyard.group" (list $ $given) | fromJson -}}
{{- $_ := set $groups $key (dict
  "provider" "kubernetes" "devices" $group.devices "workers_min" $group.workersMin "workers_max" $group.workersMax
  "labels" $group.labels "namespace" $.Release.Namespace "workload" (printf "statefulset/%s-node-%s" $name $key)) -}}
{{- end -}}
{{- $own := dict
  "data_dir" "/var/lib/rocyard"
  "api" (dict "host" "0.0.0.0" "port" 8000)
  "dask" (dict "host" (printf "%s-scheduler" $name) "port" 8786 "dashboard_port" 8787)
  "controller" (dict "metrics_port" 9101)
  "node" (dict "metrics_port" 9102)
  "autoscaler" (dict "metrics_port" 9103 "mode" .Values.autoscaler.mode "prometheus_url" .Values.autoscaler.prometheusUrl)
  "results" (dict "url" (ternary (include "rocyard.resultsFolder" .) .Values.results.url (ne .Values.results.existingClaim "")))
  "groups" $groups -}}
{{- toYaml (mustMergeOverwrite (deepCopy .Values.settings) $own) -}}
{{- end }}

{{/* Refuses what a schema cannot say, or cannot say clearly. */}}
{{- define "rocyard.validate" -}}
{{- if and (not .Values.store.enabled) (not .Values.store.existingSecret) -}}
{{ fail "store.enabled is false, so store.existingSecret must name a Secret with the URL of your store" }}
{{- end -}}
{{- if and (not .Values.store.existingSecret) (or (ne .Values.store.keys.url "url") (ne .Values.store.keys.workerUrl "worker-url") (ne .Values.store.keys.users "users.acl")) -}}
{{ fail "store.keys names keys of store.existingSecret, which is empty: leave them as they are, or name the Secret" }}
{{- end -}}
{{- if and .Values.results.existingClaim .Values.results.url -}}
{{ fail "results.existingClaim and results.url are two places for results: name one of them" }}
{{- end -}}
{{- if and .Values.results.existingSecret (not .Values.results.url) -}}
{{ fail "results.existingSecret is for results.url, which is empty" }}
{{- end -}}
{{- if and .Values.tls.existingSecret .Values.autoscaler.enabled (not .Values.autoscaler.prometheusUrl) -}}
{{ fail "with tls.existingSecret the autoscaler needs autoscaler.prometheusUrl: no certificate names the address of a controller's pod, so it cannot read the metrics there" }}
{{- end -}}
{{- $own := list
  "data_dir" "store.url" "store.worker_url" "store.host" "store.port" "tls.directory" "api.host" "api.port" "api.key" "dask.host"
  "dask.port" "dask.dashboard_port" "controller.metrics_host" "controller.metrics_port" "node.name" "node.group" "node.host"
  "node.devices" "node.simulate" "node.simulated_node" "node.stop_drain_s" "node.metrics_host" "node.metrics_port"
  "autoscaler.mode" "autoscaler.prometheus_url" "autoscaler.metrics_host" "autoscaler.metrics_port" "results.url" "groups" -}}
{{- range $own -}}
{{- $path := splitList "." . -}}
{{- $first := index $path 0 -}}
{{- if hasKey $.Values.settings $first -}}
{{- $inner := index $.Values.settings $first -}}
{{- if or (eq (len $path) 1) (and (kindIs "map" $inner) (hasKey $inner (last $path))) -}}
{{ fail (printf "settings.%s is the chart's own: secrets stand in Secrets, and the rest follows from other values (docs/kubernetes.md)" .) }}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $key, $given := .Values.groups -}}
{{- $group := include "rocyard.group" (list $ $given) | fromJson -}}
{{- if gt (int $group.workersMin) (int $group.workersMax) -}}
{{ fail (printf "groups.%s.workersMin is above groups.%s.workersMax" $key $key) }}
{{- end -}}
{{- if and (not $group.gpu) (not (regexMatch "^[0-9]+:[a-z][a-z0-9]*(/[a-z]+-nps[0-9])?$" $group.devices)) -}}
{{ fail (printf "groups.%s.devices is %q, but simulated devices (resource: none) need a model, such as 2:mi300x" $key $group.devices) }}
{{- end -}}
{{- end -}}
{{- end }}
