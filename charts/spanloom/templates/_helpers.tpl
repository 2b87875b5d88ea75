{{/* Names and labels, as charts have them. */}}
{{- define "spanloom.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "spanloom.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- /* A release may have dots in its name, a Service may not. 50 characters leave room for what is appended. */ -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $full | replace "." "-" | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "spanloom.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "spanloom.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Roles of the cluster have no namespace: their name carries it, or releases of one name would share a role. */}}
{{- define "spanloom.clusterRoleName" -}}
{{- printf "%s-%s" .Release.Namespace (include "spanloom.fullname" .) -}}
{{- end -}}

{{- define "spanloom.selectorLabels" -}}
app.kubernetes.io/name: {{ include "spanloom.name" . }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "spanloom.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "spanloom.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "spanloom.labels" -}}
{{ include "spanloom.commonLabels" . }}
app.kubernetes.io/component: agent
{{- end -}}

{{- define "spanloom.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default .Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Whether `otlp.env` has an endpoint: a word, or nothing. */}}
{{- define "spanloom.endpointFromEnvironment" -}}
{{- range list "OTEL_EXPORTER_OTLP_ENDPOINT" "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" -}}
{{- if hasKey (default (dict) $.Values.otlp.env) . -}}yes{{- end -}}
{{- end -}}
{{- end -}}
